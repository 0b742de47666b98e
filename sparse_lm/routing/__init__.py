"""Routing: routers make plans, dispatch executes them, experts compute."""
