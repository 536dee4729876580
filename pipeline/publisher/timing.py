"""Context managers and decorators that record how long a block or a call takes, and which exceptions leave it.

Exceptions of the code inside go on unchanged. If recording fails at that moment, that is only logged; where the code inside
raised nothing, an error of recording is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Self, TypeVar, cast

from pipeline.errors import Invalid

_log = logging.getLogger(__name__)

Exceptions = type[BaseException] | tuple[type[BaseException], ...]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class _Around:
    """A context manager that can also decorate functions, async ones too. Each call uses one of its own."""

    def _new(self) -> Self:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        raise NotImplementedError

    def __call__(self, function: FunctionT) -> FunctionT:
        """Decorate a function. A generator is `Invalid`: its calls do not contain its work; use `with` inside."""
        if not callable(function):
            raise Invalid(f"a function is needed to decorate, got {type(function).__name__}")
        if isgeneratorfunction(function) or isasyncgenfunction(function):
            raise Invalid(f"{function.__name__} is a generator: its work is done after the call; use `with` inside")
        if iscoroutinefunction(function):

            @wraps(function)
            async def around_await(*args: Any, **kwargs: Any) -> Any:
                with self._new():
                    return await function(*args, **kwargs)

            return cast(FunctionT, around_await)

        @wraps(function)
        def around(*args: Any, **kwargs: Any) -> Any:
            with self._new():
                return function(*args, **kwargs)

        return cast(FunctionT, around)

    def _record(self, record: Callable[[float], None], value: float, error: BaseException | None) -> None:
        if error is None:
            record(value)
            return
        try:
            record(value)
        except Exception as failed:
            _log.error("not recorded, while %s was raised: %s", type(error).__name__, failed)


class Timer(_Around):
    """Records seconds, whether the code inside returns or raises. From `view.time()` or `cell.time()`.

        with latency.time(route="/cart"):
            ...

        @latency.labels("/cart").time()
        async def cart(request): ...

    The clock never goes back. A timer may be entered again inside itself; threads and tasks need one each. A decorated
    function may run in any number of threads and tasks.
    """

    def __init__(self, record: Callable[[float], None], now_s: Callable[[], float]) -> None:
        self._record_to = record
        self._now_s = now_s
        self._started_s: list[float] = []

    def _new(self) -> Timer:
        return Timer(self._record_to, self._now_s)

    def __enter__(self) -> Self:
        self._started_s.append(self._now_s())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._record(self._record_to, self._now_s() - self._started_s.pop(), error)


class ExceptionCounter(_Around):
    """Adds 1 when an exception of the given types leaves the code inside, and lets it go on. Can be shared by threads.

    with failures.count_exceptions(OSError, job="import"):
        ...
    """

    def __init__(self, record: Callable[[float], None], exception: Exceptions) -> None:
        types: tuple[Any, ...] = exception if isinstance(exception, tuple) else (exception,)
        if not types or not all(isinstance(it, type) and issubclass(it, BaseException) for it in types):
            raise Invalid(f"exception types are needed, got {exception!r:.100}")
        self._record_to = record
        self._types = types

    def _new(self) -> ExceptionCounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error, self._types):
            self._record(self._record_to, 1, error)
