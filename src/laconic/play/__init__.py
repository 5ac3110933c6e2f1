"""A playground in the browser: a model under many methods and keep rates, as static files."""
