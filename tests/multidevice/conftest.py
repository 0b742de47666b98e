"""Devices here are threads of one CPU and programs are tiny: compile fast. Read by XLA when the first device is asked for."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
