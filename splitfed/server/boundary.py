"""Where errors become status codes: the one place between the services and the wire."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from splitfed.errors import RoundLost, ServerUnreachable, SplitFedError
from splitfed.transport.status import status_of

_log = logging.getLogger(__name__)


class ErrorBoundary(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Turns what a service raises into a status code and one sentence; an agent never sees a traceback."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Wrap the handler of a call."""
        handler: Any = await continuation(handler_call_details)
        guards: dict[str, Any] = {
            "unary_unary": _guard_unary,
            "stream_unary": _guard_unary,
            "unary_stream": _guard_stream,
            "stream_stream": _guard_stream,
        }
        for shape, guard in guards.items():
            behaviour = getattr(handler, shape, None)  # of a method that nobody serves there is no handler
            if behaviour is not None:
                return handler._replace(**{shape: guard(behaviour, handler_call_details.method)})
        return handler


def _guard_unary(behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the servicer boundary
            await _abort(error, method, context)

    return guarded


def _guard_stream(behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for reply in behaviour(request, context):
                yield reply
        except aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the servicer boundary
            await _abort(error, method, context)

    return guarded


async def _abort(error: Exception, method: str, context: Any) -> None:
    if isinstance(error, (RoundLost, ServerUnreachable)):  # as they come in any run: the agent comes back
        _log.info("an agent was told to come back: %s", error)
    elif isinstance(error, SplitFedError):
        _log.warning("an agent was refused: %s", error)
    if isinstance(error, SplitFedError):
        _log.debug("the call was %s", method)
        await context.abort(status_of(error), str(error))
    _log.exception("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "The server failed; its log says why.")
