"""Pickles of plain tables, read without the means of pickle: nothing that a file names is imported, called or hashed.

Python's own unpickler takes memory for whatever place a file names in its memo, and hashes keys that are tuples of
tuples for ever. This one knows the few opcodes that torch.save() writes for named tensors.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Final

Calls = Mapping[str, Callable[..., Any]]
"""What a pickle may call, as `module name`."""

_VALUES: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"})
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MADE: Final[Mapping[str, Callable[[], Any]]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class PickleError(ValueError):
    """The pickle holds something else than a plain table, or is damaged."""


class _Mark:
    """Where the items of a list, tuple or dict begin on the stack."""


_MARK: Final = _Mark()


def load(content: bytes, calls: Calls, persistent: Callable[[Any], Any]) -> Any:
    """The value that the pickle builds. `persistent` makes what stands for a persistent id.

    Raises PickleError for whatever is not plain, and what calls and `persistent` raise.
    """
    machine = _Machine(calls, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.do(opcode.name, argument)
        [value] = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"its pickle is damaged ({type(error).__name__})") from error
    return value


class _Machine:
    def __init__(self, calls: Calls, persistent: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._calls = calls
        self._persistent = persistent

    def do(self, name: str, argument: Any) -> None:
        """One opcode, by pickletools' name."""
        stack = self.stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in _TUPLES:
            self._take(_TUPLES[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name not in ("PROTO", "STOP"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "SETITEM" | "SETITEMS":
                items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                self._fill(stack[-1], items)
            case "APPEND" | "APPENDS":
                items = self._marked() if name == "APPENDS" else [stack.pop()]
                _of(stack[-1], list).extend(items)
            case "GLOBAL":
                stack.append(self._callable(argument))
            case "REDUCE":
                arguments, function = _of(stack.pop(), tuple), stack.pop()
                if function not in self._calls.values():
                    raise PickleError("it calls a value that is no function")
                stack.append(function(*arguments))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "BUILD":  # attributes of a dict, such as a state_dict's _metadata: of no use here
                stack.pop()
                _of(stack[-1], dict)
            case _:
                raise PickleError(f"it has the opcode {name}, which a file of weights does not need")

    def _callable(self, name: str) -> Callable[..., Any]:
        if name not in self._calls:
            told = ascii(name.replace(" ", "."))[1:-1]  # it may hold anything, halves of characters too
            raise PickleError(f"it wants to call {told}, which could run anything")
        return self._calls[name]

    def _take(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _marked(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    @staticmethod
    def _fill(table: Any, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        for key, value in pairs:
            if not isinstance(key, str | int):
                raise PickleError(f"a {type(key).__name__} is no name of a tensor")
            _of(table, dict)[key] = value


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"a {type(value).__name__} stands where a {kind.__name__} should be")
    return value
