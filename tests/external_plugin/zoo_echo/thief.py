"""A plugin that claims a name of the zoo's own; what is in the tree has it first, whatever the plugin is called."""

import dataclasses

from zoo_echo import PLUGIN as ECHO

PLUGIN = dataclasses.replace(ECHO, presets={"retnet-tiny": {}}, mixers={})
