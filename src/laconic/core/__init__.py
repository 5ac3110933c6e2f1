"""How a reduced model runs: tokens, schedules, methods and reducers, the views of attention, and the runtime."""
