#!/usr/bin/env python3
"""extract.py KUBERNETES KUBEVIRT: makes schemas.json of the two projects' swagger.json (README.md says which).

Takes the definitions that our manifests' kinds need, without their descriptions. As the API server does with strict
validation of fields, it has no field that isn't there accepted; and it writes down what OpenAPI only says by a format.
"""
import json
import sys

KINDS = [
    {"DaemonSet": "io.k8s.api.apps.v1.DaemonSet", "ConfigMap": "io.k8s.api.core.v1.ConfigMap", "Namespace": "io.k8s.api.core.v1.Namespace"},
    {"VirtualMachineInstance": "v1.VirtualMachineInstance", "KubeVirt": "v1.KubeVirt"},
]


def references(x):
    if isinstance(x, dict):
        if isinstance(x.get("$ref"), str):
            yield x["$ref"].rsplit("/", 1)[1]
        for v in x.values():
            yield from references(v)
    elif isinstance(x, list):
        for v in x:
            yield from references(v)


def schema(x, prefix):
    """A schema of OpenAPI's as one of JSON's."""
    if "$ref" in x:
        return {"$ref": "#/definitions/" + prefix + x["$ref"].rsplit("/", 1)[1]}
    out = {k: x[k] for k in ("type", "required", "enum") if k in x}
    if x.get("format") == "int-or-string":
        out["type"] = ["integer", "string"]
    if "items" in x:
        out["items"] = schema(x["items"], prefix)
    if "properties" in x:
        out["properties"] = {k: schema(v, prefix) for k, v in x["properties"].items()}
        out["additionalProperties"] = False
    elif "additionalProperties" in x:
        out["additionalProperties"] = schema(x["additionalProperties"], prefix) if isinstance(x["additionalProperties"], dict) else x["additionalProperties"]
    return out


def main():
    kinds, definitions = {}, {}
    for kind, path, prefix in zip(KINDS, sys.argv[1:], ("kubernetes.", "kubevirt.")):
        with open(path, encoding="utf-8") as f:
            all_of_them = json.load(f)["definitions"]
        todo = list(kind.values())
        while todo:
            name = todo.pop()
            if prefix + name in definitions:
                continue
            definition = dict(all_of_them[name])
            if name.endswith("resource.Quantity"):
                definition = {"type": "string", "format": "int-or-string"}  # 1 and "1Gi" are both read
            definitions[prefix + name] = schema(definition, prefix)
            todo += references(definition)
        kinds.update({k: {"$ref": "#/definitions/" + prefix + v} for k, v in kind.items()})
    json.dump({"$schema": "http://json-schema.org/draft-07/schema#", "kinds": kinds, "definitions": dict(sorted(definitions.items()))},
              sys.stdout, separators=(",", ":"))
    print()


main()
