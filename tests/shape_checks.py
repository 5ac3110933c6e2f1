"""The shape checks of the tests: every function of laconic looks at what it is given and at what it returns.

jaxtyping's own hook keeps a scope of axis names for every call there is, and has beartype look at the arguments twice; that
takes longer than the models do. Here only functions with a shape in their annotations have a scope, and each looks once.
"""

import functools
import inspect
import types
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

CHECK = beartype(conf=BeartypeConf(violation_type=TypeError))
THEIRS = jaxtyping.jaxtyped


def switch_on():
    """Let what jaxtyping's hook writes before every function and class of laconic be `checked`."""
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook("laconic", "beartype.beartype")


def checked(thing=None, *, typechecker=None):
    """A function, method or property, or the constructor of a dataclass, with its checks."""
    if thing is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(thing):
        if "__dataclass_fields__" in vars(thing) and "__init__" in vars(thing):
            thing.__init__ = _function(thing.__init__)
        return thing
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(_function(thing.__func__))
    if isinstance(thing, property):
        return property(*(f and _function(f) for f in (thing.fget, thing.fset, thing.fdel)))
    return _function(thing)


def _function(function):
    if inspect.isgeneratorfunction(function):  # beartype alone would look when it is first asked for an item
        return THEIRS(function, typechecker=CHECK)
    # made at the first call: by then all names of the module are known, and most functions are never called
    made = functools.cache(lambda: _made(function))

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        __tracebackhide__ = True
        call, has_shapes = made()
        if not has_shapes:
            return call(*args, **kwargs)
        with THEIRS("context"):
            return call(*args, **kwargs)

    return wrapped


def _made(function):
    """The function with its checks, and whether there are shapes among its annotations."""
    hints = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, hints
    copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
    return CHECK(copied), any(_has_shape(hint) for hint in hints.values())


def _resolved(hint, function):
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"hint": hint}), function.__globals__)["hint"]
    except NameError:  # imported for the type checker alone
        return typing.Any


def _has_shape(hint):
    if isinstance(hint, list):
        return any(map(_has_shape, hint))
    is_shape = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return is_shape or any(map(_has_shape, typing.get_args(hint)))
