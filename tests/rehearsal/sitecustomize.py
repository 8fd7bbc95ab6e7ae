"""Python runs this when it starts, if this folder is on PYTHONPATH: so do all processes that a rehearsal starts."""

import transformer_engine_on_cpu

transformer_engine_on_cpu.rewrite_imports()
