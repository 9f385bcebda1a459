"""The application: endpoints behind the guard."""

from __future__ import annotations

from fastapi import FastAPI

import dp_runtime
from dp_runtime.server.admin import admin_routes
from dp_runtime.server.chat.routes import chat_routes
from dp_runtime.server.completions import completion_routes
from dp_runtime.server.errors import add_error_handlers
from dp_runtime.server.http.guard import Guard
from dp_runtime.server.service import control_routes, model_routes, token_routes
from dp_runtime.server.state import ServerState


def make_app(state: ServerState) -> FastAPI:
    app = FastAPI(
        title="dp-runtime", version=dp_runtime.__version__, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # a redirect would lead wherever the request's Host says
    )  # fmt: skip
    for routes in (
        completion_routes, chat_routes, model_routes, token_routes, control_routes, admin_routes,
    ):  # fmt: skip
        app.include_router(routes(state))
    add_error_handlers(app)
    app.add_middleware(Guard, state=state)
    return app
