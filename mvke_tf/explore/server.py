# SPDX-License-Identifier: Apache-2.0
"""The process of the page."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mvke_tf.explore.explorer import Explorer
from mvke_tf.explore.page import CSS, THEME, page
from mvke_tf.run import Run
from mvke_tf.serving.rest.server import LOOPBACK_NAMES, bind, signals_end_well, url

logger = logging.getLogger(__name__)

# Seconds that an answer under way has after a signal; browsers keep a connection open for ever.
GRACE_SECONDS = 1


def explore(run: Run, port: int = 7860) -> None:
    """Shows a run as a page for this machine only, until SIGINT or SIGTERM.

    Args:
        run: A run with a checkpoint and its prepared data.
        port: Its port; 0 takes any free one.

    Raises:
        MvkeError: If the run cannot be shown.
        OSError: If the address cannot be had.
    """
    with bind("127.0.0.1", port) as bound:
        explorer = Explorer(run)
        explorer.warm_up()
        served = server(application(explorer))
        bound.listen()
        logger.info("Exploring %s at %s", run.folder, url(bound))
        logger.info("Open this address in a browser. Ctrl-C stops it.")
        with signals_end_well():
            served.run(sockets=[bound])
    logger.info("Stopped.")


def application(explorer: Explorer) -> Any:
    """The page as an ASGI application, for requests addressed to this machine by name only."""
    api = FastAPI(openapi_url=None)
    mounted = gr.mount_gradio_app(api, page(explorer), path="/", theme=THEME, css=CSS, footer_links=[], ssr_mode=False)
    # Otherwise a page from elsewhere could read this one, under a name that it has made lead here.
    mounted.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK_NAMES))
    return mounted


def server(application: Any) -> uvicorn.Server:
    """A server of the application, not started."""
    return uvicorn.Server(
        uvicorn.Config(
            application,
            loop="asyncio",
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
