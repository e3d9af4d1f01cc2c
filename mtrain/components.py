"""Parts that a config names: `class_path` (a short name, or the import path of the user's own class) and `init_args`."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_serializer, model_validator

from mtrain.errors import UserError, nearest


class Spec(BaseModel):
    """A class and its options. In YAML a bare name is short for a class without options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_path: str
    init_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"class_path": value} if isinstance(value, str) else value

    @model_serializer
    def _to_yaml(self) -> Any:
        return {"class_path": self.class_path, "init_args": self.init_args} if self.init_args else self.class_path


def build(spec: Spec, known: Mapping[str, Callable[..., Any]], where: str, **given: Any) -> Any:
    """Instantiate the class that `spec` names with its checked options.

    Args:
        known: short names; a dotted name is imported instead.
        where: the config key, for messages.
        given: arguments that mtrain supplies where the signature has them.

    Raises:
        UserError: the name is unknown, an option is unknown, missing or of the wrong type, or the class refuses it.
    """
    cls, parameters = find(spec.class_path, known, where), signature(spec, known, where)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplied = {k: v for k, v in given.items() if k in parameters}
    fields: dict[str, Any] = {
        name: (
            Any if p.annotation is p.empty else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for name, p in parameters.items()
        if name not in supplied and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # an option may be called `copy` or `json`
        options = create_model(
            "Options",
            __config__=ConfigDict(extra="allow" if takes_any else "forbid", arbitrary_types_allowed=True),
            **fields,
        )
    try:
        checked = options.model_validate(spec.init_args)
    except ValidationError as error:
        raise UserError(first_problem(error, f"{where}.init_args", fields)) from None
    values = {name: getattr(checked, name) for name in fields} | (checked.model_extra or {})
    try:
        return cls(**supplied, **values)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own class may raise anything
        raise UserError(f"{where}: '{spec.class_path}' fails with {values}: {type(error).__name__}: {error}") from error


def signature(spec: Spec, known: Mapping[str, Callable[..., Any]], where: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of the class that `spec` names."""
    cls = find(spec.class_path, known, where)
    try:
        try:
            return inspect.signature(cls, eval_str=True).parameters
        except NameError:  # a dataclass has fields of its bases, whose types are names of their modules
            modules = [vars(sys.modules[base.__module__]) for base in reversed(cls.__mro__)]  # type: ignore[attr-defined]
            names = {name: value for module in modules for name, value in module.items()}
            return inspect.signature(cls, locals=names, eval_str=True).parameters
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise UserError(f"{where}: '{spec.class_path}' is not a class with options ({error})") from None


def find(name: str, known: Mapping[str, Callable[..., Any]], where: str) -> Callable[..., Any]:
    """The class behind a short name or an import path."""
    if name in known:
        return known[name]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise UserError(f"{where}: '{name}' is unknown{nearest(name, known)}; your own class needs its import path")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # importing runs the user's own module
        raise UserError(f"{where}: cannot import '{name}' ({type(error).__name__}: {error})") from error


def is_own(part: object) -> bool:
    """Whether the class of a part is the user's own, not mtrain's."""
    return type(part).__module__.partition(".")[0] != "mtrain"


def worst(error: ValidationError) -> Any:
    """The problem to name: an unknown option, which often explains a missing one, else the first."""
    problems = error.errors()
    return next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])


def first_problem(error: ValidationError, where: str, known: Mapping[str, Any]) -> str:
    """One line for the first thing that pydantic found wrong; `known` are the names allowed at the top."""
    problem = worst(error)
    path = _keys(problem)
    key = ".".join([where, *path] if where else path)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown option{nearest(path[-1], known)}"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # over several keys: it names them
        return problem["msg"].removeprefix("Value error, ")
    messages = [_TYPES.get(p["type"], p["msg"]) for p in error.errors() if _keys(p) == path]
    message = " or ".join(dict.fromkeys(messages)).removeprefix("Value error, ").replace(" or expected", " or")
    return f"{key}: found {problem['input']!r}; {message[:1].lower()}{message[1:]}"


_TYPES = {
    "model_type": "expected a section of keys and values",
    "string_type": "expected text",
    "list_type": "expected a list",
    "dict_type": "expected a section of keys and values",
}


def _keys(problem: Any) -> list[str]:
    """Where a problem is, without the names of types that pydantic adds in a union."""
    parts = [str(part) for part in problem["loc"]]
    types = ("str", "int", "float", "bool")
    return [p for i, p in enumerate(parts) if not (i and (p in types or p.startswith(("list[", "dict[", "literal["))))]
