"""A template's own text, changed so that the sandbox counts what it does.

Jinja makes Python code of a template, which asks the environment about calls and operators and does all else directly.
Here loops, slices, comparisons, ``~`` and keys become filters of the sandbox too, under names that no template can
write; and a body that may run again says how long it is.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class Counting(NodeTransformer):
    """Puts the environment's functions where Jinja would let Python do the work directly."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        """Its turns are counted where the values come from, if each of them is a turn."""
        counts = _counts(node)
        self.generic_visit(node)
        if node.test is not None or node.recursive:
            node.body.insert(0, _begun(node, counts))
            counts = []
        node.iter = _filter(node.iter, " turns", counts)
        return node

    def _body(self, node: Any) -> Any:
        counts = _counts(node)
        self.generic_visit(node)
        node.body.insert(0, _begun(node, counts))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            if not isinstance(node.arg, nodes.Const):
                node.arg = _filter(node.arg, " weighed")
            return node
        parts = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _filter(node.node, " slice", parts)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), " joined")

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        """A sum of many is one operation: the texts of most templates are such sums."""
        self.generic_visit(node)
        if isinstance(node.left, nodes.Filter) and node.left.name == " summed":
            node.left.node.items.append(node.right)  # type: ignore[union-attr]
            return node.left
        return _filter(nodes.List([node.left, node.right], lineno=node.lineno), " summed")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """What is compared with a constant is looked at no deeper than that, unless it is searched."""
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        is_shallow = len(node.ops) == 1 and any(isinstance(side.expr, nodes.Const) for side in sides)
        for side in sides:
            is_searched = isinstance(side, nodes.Operand) and side.op in ("in", "notin")
            if not isinstance(side.expr, nodes.Const) and (is_searched or not is_shallow):
                side.expr = _filter(side.expr, " searched" if is_searched else " weighed")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(node.key, " weighed")
        return node


def _counts(node: nodes.Node) -> list[Any]:
    """How many characters of text a body has that may run again, and steps that are not counted singly."""
    texts = [data.data for data in node.find_all(nodes.TemplateData)]
    texts += [const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
    steps = 1 + (sum(1 for _ in node.find_all(nodes.Node)) >> 3)
    return [nodes.Const(sum(map(len, texts))), nodes.Const(steps)]


def _begun(node: nodes.Node, counts: list[Any]) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(None), " begun", counts), lineno=node.lineno)


def _filter(value: Any, name: str, args: list[Any] | None = None) -> nodes.Filter:
    return nodes.Filter(value, name, args or [], [], None, None, lineno=value.lineno)
