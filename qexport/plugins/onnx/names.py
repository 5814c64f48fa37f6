"""Name nodes and tensors of an exported graph after the modules they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

_FX_NODE = "pkg.torch.onnx.fx_node"


def mark_paths(model: ir.Model, sites: Mapping[str, str]) -> None:
    """Write the site, `PATH@CALL`, of each node into its metadata, before any pass moves it.

    Args:
        model: as torch.onnx exported it.
        sites: site of each fx node, by node name; empty for a node that no module owns.
    """
    for node in model.graph:
        match = re.match(r"%(\S+)", node.metadata_props.get(_FX_NODE, ""))
        site = sites.get(match.group(1), "") if match else ""
        node.metadata_props.clear()
        if site:
            node.metadata_props["site"] = site


def name_all(model: ir.Model, tensors: Mapping[str, str]) -> None:
    """Rename every node to `PATH/Operator` and every tensor after its producer.

    A second call of a module is `PATH@1/...`; a second operator of the same type in one call gets a number.

    Args:
        model: the finished graph.
        tensors: names that are decided already, by current name.
    """
    _spread(model)
    counts: Counter[str] = Counter()
    for node in model.graph:
        site = node.metadata_props["site"].removesuffix("@0")
        stem = f"{site}/{node.op_type}"
        name = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        node.name = name
        for index, output in enumerate(node.outputs):
            if output.is_graph_output():
                continue
            given = tensors.get(output.name or "")
            output.name = given or f"{name}/output" + (f"_{index}" if index else "")
        node.metadata_props.clear()
        _name_body(node)
    _name_constants(model)


def _name_body(node: ir.Node) -> None:
    """Name what a loop or a condition holds after it: `PATH/Loop/MatMul`."""
    counts: Counter[str] = Counter()
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        for inner in attribute.as_graph():
            stem = f"{node.name}/{inner.op_type}"
            inner.name = f"{stem}_{counts[stem]}" if counts[stem] else stem
            counts[stem] += 1
            for index, output in enumerate(inner.outputs):
                output.name = f"{inner.name}/output" + (f"_{index}" if index else "")


def _spread(model: ir.Model) -> None:
    """Give a site to nodes without one: their producer's, else their consumer's."""
    nodes = list(model.graph)
    for node in nodes:
        if "site" not in node.metadata_props:
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if producer is not None and "site" in producer.metadata_props:
                    node.metadata_props["site"] = producer.metadata_props["site"]
                    break
    for node in reversed(nodes):
        if "site" not in node.metadata_props:
            users = [use.node for output in node.outputs for use in output.uses()]
            node.metadata_props["site"] = next(
                (user.metadata_props["site"] for user in users if "site" in user.metadata_props), "detector@0"
            )


def _name_constants(model: ir.Model) -> None:
    """Name each initializer after its first consumer and what it is to it."""
    counts: Counter[str] = Counter()
    graph = model.graph
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if not uses:
            graph.initializers.pop(value.name)
            continue
    order = {id(node): index for index, node in enumerate(graph)}
    for value in sorted(
        graph.initializers.values(), key=lambda item: min(order[id(use.node)] for use in item.uses())
    ):
        user = min(value.uses(), key=lambda use: (order[id(use.node)], use.idx))
        stem = f"{user.node.name}/input_{user.idx}"
        counts[stem] += 1
        name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
