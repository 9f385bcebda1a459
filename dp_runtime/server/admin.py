"""Endpoints for who runs the server: other ranks while it serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from dp_runtime.server.protocol.service import DrainBody, ResizeBody
from dp_runtime.server.state import ServerState

Content = dict[str, Any]


def admin_routes(state: ServerState) -> APIRouter:
    routes = APIRouter(prefix="/admin")
    policy = state.config.unknown_fields

    @routes.post("/resize")
    async def resize(body: ResizeBody) -> Content:
        """Serve with so many ranks; answers once they do, and no request is lost."""
        body.check_fields(policy)
        return {"dp_ranks": await state.engine.resize(body.dp_size)}

    @routes.post("/drain")
    async def drain(body: DrainBody) -> Content:
        """Serve without a rank, whose requests may end there for timeout_s before they move."""
        body.check_fields(policy)
        return {"dp_ranks": await state.engine.drain(body.dp_rank, body.timeout_s)}

    return routes
