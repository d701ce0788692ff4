"""A model that reads segment by segment."""

from torch import Tensor
from transformers import Cache
from transformers.utils import can_return_tuple

from zoo.mixer import RecurrentMixer, Shared, Tokens
from zoo.modeling import ZooModel, ZooModelOutput
from zoo.nn import SoftmaxAttention
from zoo.segments.run import take_recorded
from zoo.segments.stack import SegmentedStack


class SegmentedModel(ZooModel):
    """A model whose layers a `SegmentedStack` runs: `self.stack`, which the subclass makes."""

    stack: SegmentedStack

    def keepers(self) -> list[RecurrentMixer]:
        """The stack alone; while the model is being built, what stands inside of it."""
        return [self.stack] if hasattr(self, "stack") else super().keepers()

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        return self.stack(x, {}, tokens, past_key_values)

    @can_return_tuple
    def forward(self, *args, **kwargs) -> ZooModelOutput:
        """As of every model. Hidden states are (b t d); the attention weights of a layer are a tuple, one for each run
        of the layers, with the slots of that run for tokens."""
        kwargs.setdefault("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        outputs = super().forward(*args, **kwargs)
        if outputs.hidden_states is not None:
            recorded, left = take_recorded(outputs.shared)
            outputs.shared, outputs.hidden_states = left or None, (*recorded, outputs.last_hidden_state)
        if outputs.attentions is not None:
            layers = sum(isinstance(module, SoftmaxAttention) for module in self.modules())
            outputs.attentions = tuple(outputs.attentions[i::layers] for i in range(layers))
        return outputs
