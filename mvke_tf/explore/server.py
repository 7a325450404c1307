# SPDX-License-Identifier: Apache-2.0
"""The process of the page."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Collection
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mvke_tf.explore.explorer import Explorer
from mvke_tf.explore.page import CSS, THEME, page
from mvke_tf.run import Run
from mvke_tf.serving.rest.server import ANY_HOST, LOOPBACK_NAMES, bind, signals_end_well, url

logger = logging.getLogger(__name__)

# Seconds that an answer under way has after a signal; browsers keep a connection open for ever.
GRACE_SECONDS = 1


def explore(run: Run, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Shows a run as a local page until SIGINT or SIGTERM.

    Args:
        run: A run with a checkpoint and its prepared data.
        host: Address to listen on.
        port: Its port; 0 takes any free one.

    Raises:
        MvkeError: If the run cannot be shown.
        OSError: If the address cannot be had.
    """
    with bind(host, port) as bound:
        explorer = Explorer(run)
        explorer.warm_up()
        hosts: Collection[str] = LOOPBACK_NAMES
        if not ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
            logger.warning("Everybody who can reach this machine can see the users of this run.")
            hosts = (ANY_HOST,)
        served = server(application(explorer, (*hosts, host)))
        bound.listen()
        logger.info("Exploring %s at %s", run.folder, url(bound))
        logger.info("Open this address in a browser. Ctrl-C stops it.")
        with signals_end_well():
            served.run(sockets=[bound])
    logger.info("Stopped.")


def application(explorer: Explorer, hosts: Collection[str] = LOOPBACK_NAMES) -> Any:
    """The page as an ASGI application, for requests addressed to some names only."""
    api = FastAPI(openapi_url=None)
    mounted = gr.mount_gradio_app(api, page(explorer), path="/", theme=THEME, css=CSS, footer_links=[], ssr_mode=False)
    # Otherwise a page from elsewhere could read this one, under a name that it has made lead here.
    mounted.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
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
