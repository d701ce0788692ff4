"""Models that read segment by segment with a memory: all their layers together are one recurrent mixer.

A segment is a fixed number of tokens. Inside of it the layers work as ever; at its end a memory is written, what the
layers kept of the segment is dropped, and the next segment finds the memory only. So the state of the whole stack is
the place in the open segment, the memory, and what each layer keeps of the open segment, and all that the state
contract promises follows from it: padding, packing, rollback, beams, files.

Where FSDP2 shards the layers, weights are whole inside of a layer's `forward` only, which runs once for every run, and
all processes run it equally often: rows of one length make as many runs, whatever documents are in them.

    model.py        SegmentedModel, a model whose layers a stack runs
    stack.py        SegmentedStack, which reads runs and carries the state; an architecture writes `run_segment`
    run.py          Run, what the layers read at once, and OpenSegment, their cache inside of it
    layout.py       which tokens go into which run
    attention.py    SegmentAttention, softmax attention over the open segment

Letters: b batch, t tokens of the call, d width, r runs of the layers, n slots of a run.
"""

from zoo.segments.attention import SegmentAttention
from zoo.segments.model import SegmentedModel
from zoo.segments.run import OpenSegment, Run
from zoo.segments.stack import SegmentedStack

__all__ = ["OpenSegment", "Run", "SegmentAttention", "SegmentedModel", "SegmentedStack"]
