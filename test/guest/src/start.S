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
	lgdt gdt_register
	ljmp $8, $1f
1:	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	call guest_main
2:	hlt
	jmp 2b

/* The local APIC's timer, which ends a rest: only its end of interrupt is due. */
	.globl tick
tick:
	movl $0, 0xfee000b0
	iret

	.section .rodata
	.balign 8
gdt:	.quad 0
	.quad 0x00cf9b000000ffff	/* code, flat */
	.quad 0x00cf93000000ffff	/* data, flat */
gdt_register:
	.word gdt_register - gdt - 1
	.long gdt

	.bss
	.balign 16
	.skip 4096
stack_end:
	.section .note.GNU-stack, "", @progbits
