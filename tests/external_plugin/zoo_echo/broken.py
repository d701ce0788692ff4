"""A plugin that cannot be imported, as one that was built for another version of something."""

raise ImportError("this plugin needs a library that is not there")
