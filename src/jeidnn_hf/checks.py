"""Values that a person wrote (a config, a YAML file) against the annotations of what they are for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KINDS = {float: Real, int: Integral, list: Sequence, dict: Mapping}
"""What passes for a type: a whole number for a float, a tuple for a list, ..."""


def check_type(name: str, value: Any, hint: Any) -> None:
    """A ValueError unless ``value`` is of the annotated type, or binds to it where that is a dataclass.

    Values of a ``dict[str, ...]`` are looked at too; what a list holds is not.
    """
    if is_dataclass(hint):
        check_arguments(name, value, hint)
    elif not _matches(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"Expected {name} to be {wanted}, but got {value!r}.")
    elif get_origin(hint) is dict:
        for key, item in value.items():
            check_type(f"{key} in {name}", item, get_args(hint)[1])


def check_arguments(where: str, values: Any, target: Callable) -> None:
    """A ValueError unless ``target(**values)`` binds: names that it has, none missing, of the annotated types.

    ``where`` is what the values are called in the message; ``target`` a function or a dataclass.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"Expected {where} to be a mapping from names to values, but got {values!r}.")
    parameters, hints = inspect.signature(target).parameters, get_type_hints(target)
    if unknown := [name for name in values if name not in parameters]:
        raise ValueError(f"Expected the keys of {where} among {sorted(parameters)}, but got {unknown}.")
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"Expected {missing} in {where}, but got {list(values)} only.")
    for name, value in values.items():
        check_type(f"{name} in {where}", value, hints.get(name, Any))


def _matches(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    kind = get_origin(hint) or hint
    if isinstance(value, bool) and kind in (int, float) or isinstance(value, str) and kind in (list, Sequence):
        return False
    return isinstance(value, _KINDS.get(kind, kind))
