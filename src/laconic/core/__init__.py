"""The machinery of a reduced model: tokens, schedules, methods and reducers, attention views, and the runtime."""
