"""Klusta's ``.prb`` files: Python source, evaluated without executing any of it.

Such files are written by hand and by programs, in a small subset of Python: literals, names assigned before,
arithmetic, ``range``, comprehensions, loops that fill a dictionary. This subset is evaluated here on the syntax tree.
Values are numbers, strings, None, lists, tuples, dictionaries and sets; functions and methods are those listed here.

Time and memory are bounded, whatever the file contains: each step costs 1 of a budget, and so does each element that
is created, visited or compared. Integers have 64 bits. Only flat values are compared or hashed, as a list that holds
another one twice, which in turn does the same, would unfold exponentially.
"""

from __future__ import annotations

import ast
import operator
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ks4stream.errors import ProbeError
from ks4stream.io.records import ONE_AT_A_TIME

_BUDGET = 2_000_000  # steps and elements: a file written by write_prb for 1000 contacts takes 15 000
_LONGEST_FILE = 500_000  # characters: parsing as many statements briefly takes some 300 MB
_MAX_INTEGER = 2**63 - 1
_MAX_EXPONENT = 64

_NUMBERS = (int, float)
_SCALARS = (int, float, str, type(None))
_MAY_HOLD = (list, tuple, dict, set)
_CONTAINERS = (*_MAY_HOLD, str)

_ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_OF_SCALARS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "float": float,
    "int": int,
    "str": str,
    "round": lambda number, digits=None: round(float(number), digits),  # round() of integers computes powers of ten
}
_OF_ITEMS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "len": len,
    "enumerate": lambda items, start=0: list(enumerate(items, start)),
    "reversed": lambda items: items[::-1],
    "zip": lambda *columns: list(zip(*columns, strict=False)),  # as in Python, the shortest one ends it
}
_OF_FLAT_ITEMS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "set": set,
    "sorted": sorted,
    "sum": lambda items: sum(items),
}
_OF_NUMPY: dict[str, Callable[..., Any]] = {
    f"{kind}{bits}": function
    for kind, function, sizes in [("int", int, "8 16 32 64 p"), ("uint", int, "8 16 32 64"), ("float", float, "32 64")]
    for bits in sizes.split()
}
_NUMPY = object()  # the value of a name that stands for the module


def evaluate(source: str, wanted: Sequence[str], what: str) -> dict[str, Any]:
    """Evaluate the assignments of a ``.prb`` file.

    Parameters
    ----------
    source : str
        The file's text.
    wanted : sequence of str
        Names whose values are wanted.
    what : str
        The file, for messages.

    Returns
    -------
    dict of str to value
        Values of the wanted names that the file assigns.

    Raises
    ------
    ProbeError
        If the file is not Python, uses more than the subset evaluated here, or needs too many steps. Other Python does
        no harm if it is assigned to a name that nothing else depends on.

    Examples
    --------
    >>> evaluate("n = 3\\ngeometry = {i: (0, 25 * i) for i in range(n)}", ["geometry"], "probe.prb")
    {'geometry': {0: (0, 0), 1: (0, 25), 2: (0, 50)}}
    """
    try:
        if len(source) > _LONGEST_FILE:
            raise ValueError(f"it has {len(source)} characters; at most {_LONGEST_FILE} are read")
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in strings: "C:\probes"
            module = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ProbeError(f"{what} cannot be parsed as a .prb file: {error}.") from error
    except (RecursionError, MemoryError) as error:
        raise ProbeError(f"{what} cannot be parsed as a .prb file: it is nested too deeply.") from error
    evaluator = _Evaluator()
    try:
        evaluator.run(module.body)
        return {name: evaluator.look_up(name) for name in wanted if name in evaluator.names}
    except _Outside as outside:
        text = ast.get_source_segment(source, outside.node) or type(outside.node).__name__
        text = text if len(text) <= 80 else f"{text[:79]}…"
        line, reason = getattr(outside.node, "lineno", "?"), str(outside)[:200]
    except RecursionError:
        line, text, reason = "?", "…", "it is nested too deeply"
    program = f"import probeinterface as p; p.write_probeinterface('probe.json', p.read_prb({what!r}))"
    raise ProbeError(
        f"{what}, line {line}: {text!r} cannot be evaluated: {reason}. .prb files are not executed here; literals, "
        "arithmetic, range, comprehensions and loops are supported. Write the numbers out, or, if you trust the file, "
        f"let probeinterface run it once and save the probe as JSON: python -c {shlex.quote(program)}"
    )


class _Outside(Exception):
    """A node of the syntax tree that cannot be evaluated, and why."""

    def __init__(self, node: ast.AST, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class _Evaluator(ast.NodeVisitor):
    """Evaluates statements for what they assign, and expressions for their values; knows no other nodes."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"np": _NUMPY, "numpy": _NUMPY}  # write_prb imports neither
        self.budget = _BUDGET

    def visit(self, node: ast.AST) -> Any:
        """Visit a node; errors are reported for the innermost one."""
        try:
            self.pay(1)
            return _bounded(super().visit(node))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _Outside(node, f"{error}" if type(error) is ValueError else f"{error!r}") from None

    def generic_visit(self, node: ast.AST) -> Any:
        """Refuse every type of node that has no method here."""
        raise ValueError(f"{type(node).__name__} is not supported here")

    def pay(self, cost: int) -> None:
        """Deduct the cost of the next operation from the budget."""
        if cost > self.budget:
            raise ValueError(f"the file needs more than {_BUDGET} steps and elements")
        self.budget -= cost

    # -- statements --

    def run(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def visit_Pass(self, node: ast.Pass) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.names[name] = _NUMPY if alias.name == "numpy" else _Outside(node, "nothing can be imported here")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                raise ValueError("nothing can be imported here")
            self.names[alias.asname or alias.name] = _Outside(node, "nothing can be imported here")

    def visit_Expr(self, node: ast.Expr) -> None:
        match node.value:
            case ast.Call(func=ast.Name(id="print")):
                self.assign([], node.value)
            case _:
                self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.assign(node.targets, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign([node.target], node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        before, change = self.visit(node.target), self.visit(node.value)
        if not isinstance(before, list):
            self.bind(node.target, self.combined(node.op, before, change))
        elif isinstance(node.op, ast.Add):
            before += self.items(change)  # in place, as in Python: other names may refer to the same list
        else:
            raise ValueError("the operator is not supported for a list")

    def visit_For(self, node: ast.For) -> None:
        for item in self.items(self.visit(node.iter)):
            self.bind(node.target, item)
            self.run(node.body)
        self.run(node.orelse)

    def visit_If(self, node: ast.If) -> None:
        self.run(node.body if self.visit(node.test) else node.orelse)

    def assign(self, targets: Sequence[ast.expr], expression: ast.expr) -> None:
        """Bind a value, or if it cannot be evaluated and may not be needed, the reason why not."""
        try:
            value = self.visit(expression)
        except _Outside as outside:
            if not all(isinstance(target, ast.Name) for target in targets) or self.may_change_values(expression):
                raise
            value = outside
        for target in targets:
            self.bind(target, value)

    def may_change_values(self, expression: ast.expr) -> bool:
        """Whether executing an expression in Python might change a value of the file, now or through a bound method."""
        calls = names_holder = False
        for node in ast.walk(expression):
            self.pay(1)
            if isinstance(node, ast.NamedExpr | ast.Lambda):
                return True
            calls |= isinstance(node, ast.Call | ast.Attribute)
            names_holder |= isinstance(node, ast.Name) and isinstance(self.names.get(node.id), _MAY_HOLD)
        return calls and names_holder

    def bind(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part, item in zip(parts, self.items(value), strict=True):
                    self.bind(part, item)
            case ast.Subscript(value=holder, slice=index):
                container, key = self.visit(holder), self.visit(index)
                if not isinstance(container, dict | list):
                    raise ValueError(f"items of a {type(container).__name__} cannot be assigned")
                self.pay(_weight(key))
                container[key] = value
            case _:
                raise ValueError("only names and items can be assigned")

    # -- expressions --

    def look_up(self, name: str) -> Any:
        value = self.names[name]
        if isinstance(value, _Outside):
            raise value.with_traceback(None)  # otherwise all frames that it ever passed would be kept
        return value

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise ValueError(f"name {node.id!r} is not defined")
        return self.look_up(node.id)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, _SCALARS):
            raise ValueError(f"{type(node.value).__name__} is not a supported type")
        return node.value

    def visit_List(self, node: ast.List) -> list[Any]:
        return self.elements(node.elts)

    def visit_Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.elements(node.elts))

    def visit_Set(self, node: ast.Set) -> set[Any]:
        return set(self.flat(self.elements(node.elts)))

    def visit_Dict(self, node: ast.Dict) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:  # {**other}
                self.update(made, self.visit(value))
            else:
                self.update(made, [(self.visit(key), self.visit(value))])
        return made

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> list[Any]:
        return self.comprehend(node.generators, lambda: self.visit(node.elt))

    visit_GeneratorExp = visit_ListComp

    def visit_SetComp(self, node: ast.SetComp) -> set[Any]:
        return set(self.flat(self.comprehend(node.generators, lambda: self.visit(node.elt))))

    def visit_DictComp(self, node: ast.DictComp) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self.update(made, self.comprehend(node.generators, lambda: (self.visit(node.key), self.visit(node.value))))
        return made

    def comprehend(self, generators: Sequence[ast.comprehension], make: Callable[[], Any]) -> list[Any]:
        """Create an element in each iteration; the loop variables are known only inside."""
        self.pay(len(self.names))
        outside, self.names = self.names, dict(self.names)
        try:
            return [make() for _ in self.turns(generators)]
        finally:
            self.names = outside

    def turns(self, generators: Sequence[ast.comprehension]) -> Iterator[None]:
        if not generators:
            yield
            return
        for item in self.items(self.visit(generators[0].iter)):
            self.bind(generators[0].target, item)
            if all(self.visit(test) for test in generators[0].ifs):
                yield from self.turns(generators[1:])

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return self.visit(node.body if self.visit(node.test) else node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        value = None
        for operand in node.values:
            value = self.visit(operand)
            if bool(value) == isinstance(node.op, ast.Or):
                break
        return value

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        operand = self.visit(node.operand)
        return not operand if isinstance(node.op, ast.Not) else self.combined(node.op, operand)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        return self.combined(node.op, self.visit(node.left), self.visit(node.right))

    def combined(self, op: ast.AST, *operands: Any) -> Any:
        """Arithmetic on numbers; concatenation and repetition of sequences."""
        kind, types = type(op), {type(operand) for operand in operands}
        if kind in _ARITHMETIC and all(isinstance(operand, _NUMBERS) for operand in operands):
            if kind is ast.Pow and abs(operands[1]) > _MAX_EXPONENT:
                raise ValueError(f"the exponent is larger than {_MAX_EXPONENT}")
        elif kind is ast.Add and len(types) == 1 and types <= {list, tuple, str}:
            self.pay(len(operands[0]) + len(operands[1]))
        elif kind is ast.Mult and types & {list, tuple, str} and int in types:
            sequence, times = sorted(operands, key=lambda operand: isinstance(operand, int))
            self.pay(len(sequence) * max(times, 0))
        else:
            raise ValueError("the operator is not supported for these values")
        return _bounded(_ARITHMETIC[kind](*operands))

    def visit_Compare(self, node: ast.Compare) -> bool:
        left = self.visit(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.visit(comparator)
            if isinstance(op, ast.In | ast.NotIn):
                self.pay(_weight(left) * len(self.items(right)))
                holds = (left in right) == isinstance(op, ast.In)
            elif type(op) not in _COMPARISONS:
                raise ValueError("'is' is not supported here; use == or !=")
            else:
                left, right = self.flat([left, right])
                holds = _COMPARISONS[type(op)](left, right)
            if not holds:
                return False
            left = right
        return True

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        container = self.visit(node.value)
        if not isinstance(container, list | tuple | dict | str):
            raise ValueError(f"a {type(container).__name__} has no items")
        if isinstance(node.slice, ast.Slice):
            bounds = (node.slice.lower, node.slice.upper, node.slice.step)
            part = container[slice(*(None if bound is None else self.visit(bound) for bound in bounds))]
            self.pay(len(part))
            return part
        key = self.visit(node.slice)
        self.pay(_weight(key))
        return container[key]

    def visit_Call(self, node: ast.Call) -> Any:
        arguments = self.elements(node.args)
        keywords: dict[Any, Any] = {}
        for keyword in node.keywords:
            value = self.visit(keyword.value)
            if keyword.arg is None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                raise ValueError("only a dictionary with strings as keys can follow **")
            self.update(keywords, value if keyword.arg is None else [(keyword.arg, value)])
        match node.func:
            case ast.Name(id=name) if name not in self.names:
                return self.called(name, arguments, keywords)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if self.names.get(name) is _NUMPY:
                if attribute in _OF_NUMPY and not keywords:
                    return self.of_scalars(_OF_NUMPY[attribute], arguments)
            case ast.Attribute(value=holder, attr=attribute) if not keywords:
                return self.method(self.visit(holder), attribute, *arguments)
        raise ValueError("the function is not supported here")

    def called(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if name == "dict":
            made: dict[Any, Any] = {}
            for argument in arguments:
                self.update(made, argument)
            return made | keywords
        if name == "print":
            return None
        if keywords:
            raise ValueError("the function is supported only without keyword arguments")
        if name in ("range", "xrange"):
            numbers = range(*arguments)
            self.pay(len(numbers))
            return list(numbers)
        if name in _OF_SCALARS:
            return self.of_scalars(_OF_SCALARS[name], arguments)
        listed = [self.items(argument) if isinstance(argument, _CONTAINERS) else argument for argument in arguments]
        if name in _OF_FLAT_ITEMS:
            for items in listed:
                self.flat(items if isinstance(items, list) else [items])
            return _OF_FLAT_ITEMS[name](*listed)
        if name in _OF_ITEMS:
            return _OF_ITEMS[name](*listed)
        raise ValueError("the function is not supported here")

    def of_scalars(self, function: Callable[..., Any], arguments: list[Any]) -> Any:
        self.flat(arguments)
        if not all(isinstance(argument, _SCALARS) for argument in arguments):
            raise ValueError("the function is supported only for numbers")
        return function(*arguments)

    def method(self, holder: Any, name: str, *arguments: Any) -> Any:
        match holder, name, arguments:
            case list(), "append", (item,):
                holder.append(item)
            case list(), "extend", (more,):
                holder.extend(self.items(more))
            case dict(), "update", (more,):
                self.update(holder, more)
            case dict(), "keys", ():
                return self.items(holder)
            case dict(), "values", ():
                return [holder[key] for key in self.items(holder)]
            case dict(), "items", ():
                return [(key, holder[key]) for key in self.items(holder)]
            case _:
                raise ValueError("the method is not supported here")

    # -- operations that cost by size --

    def elements(self, nodes: Sequence[ast.expr]) -> list[Any]:
        """Values of expressions, starred ones unpacked."""
        made: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                made += self.items(self.visit(node.value))
            else:
                made.append(self.visit(node))
        return made

    def items(self, container: Any) -> list[Any]:
        """Items of a container (keys of a dictionary) as a new list."""
        if not isinstance(container, _CONTAINERS):
            raise ValueError(f"a {type(container).__name__} has no items")
        self.pay(len(container))
        return list(container)

    def flat(self, items: list[Any]) -> list[Any]:
        """Pay for comparing or hashing every item."""
        for item in items:
            self.pay(_weight(item))
        return items

    def update(self, mapping: dict[Any, Any], more: Any) -> None:
        """Add the items of another dictionary, or pairs, to a dictionary."""
        for pair in more.items() if isinstance(more, dict) else self.items(more):
            key, value = self.items(pair)
            self.pay(_weight(key))
            mapping[key] = value


def _bounded(value: Any) -> Any:
    """Return a value unchanged; refuse integers that are too large, and complex numbers."""
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise ValueError("an integer has more than 64 bits")
    if isinstance(value, complex):
        raise ValueError("the number is complex")
    return value


def _weight(value: Any) -> int:
    """Cost of comparing or hashing a number, a string or a tuple of these."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, _SCALARS) for part in parts):
        raise ValueError("only numbers, strings and tuples of these can be compared here or used as keys")
    return sum(len(part) if isinstance(part, str) else 1 for part in parts)
