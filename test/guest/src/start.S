/* The multiboot entry: QEMU's -kernel loads the ELF file and jumps here in
 * 32-bit protected mode, flat segments, interrupts off. */
	.section .multiboot, "a"
	.balign 4
	.long 0x1BADB002		/* magic */
	.long 0				/* flags: nothing asked for */
	.long -(0x1BADB002)		/* checksum */

	.text
	.globl _start
_start:
	cli
	cld
	movl $stack_end, %esp
	call guest_main
1:	hlt
	jmp 1b

	.bss
	.balign 16
	.skip 4096
stack_end:
	.section .note.GNU-stack, "", @progbits
