"""The client of ``peer_flower.py``: a module of its own, so that Flower's actors keep the model from call to call."""

from __future__ import annotations

from functools import cache

import peer_work as work
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
model_of = cache(work.make_model)
data_of = cache(work.data_of)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    workload = str(message.content["config"]["workload"])
    model = model_of(workload)
    slots = work.trained(model)
    received = message.content["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, value in slots.items():
            value.copy_(received[name])
    work.train(workload, model, data_of(workload, int(context.node_config["partition-id"])))
    arrays = ArrayRecord(torch_state_dict={name: value.detach() for name, value in slots.items()})
    metrics = MetricRecord({"num-examples": work.EXAMPLES[workload]})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
