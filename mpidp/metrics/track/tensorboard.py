"""Writes numbers to RUN/tensorboard, in TensorBoard's event files. Events of a run, such as its end, are written as text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from mpidp.metrics.track.tracked import TrackedRun, scalars_of


class TensorboardTracker:
    """See tracked.Tracker. If this job computes steps again, TensorBoard hides the values that earlier jobs wrote for these
    steps."""

    note = ""
    purges = True

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer: Any = EventFileWriter(str(run.run_dir / "tensorboard"))
        if run.step:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=run.step + 1, session_log=start))

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for line in lines:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars_of(line).items()]
            values += [_text("events", f"step {line['step']}: {line['event']}")] if "event" in line else []
            when, step = line.get("unix_seconds", time.time()), int(line["step"])
            self._writer.add_event(self._event(wall_time=when, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self, ended: bool) -> None:
        self._writer.close()


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    return Summary.Value(tag=f"{tag}/text_summary", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
