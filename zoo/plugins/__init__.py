"""Makes the top-level `plugins/` of a checkout importable as `zoo.plugins`, the place where a wheel puts it."""

from zoo.layout import shelf

__path__ = [str(shelf("plugins"))]
