"""The messages and the small data types that all of fedgraft speaks in.

Sign rule, stated once: ``delta = trained - initial``; the server adds it. Control variates have the sign of a gradient.
Deltas travel in the dtype of the trained tensor (float32 or wider); sums over clients run in float64.
Rounds count from 1; round 0 is the state before training. Clients count from 0.

Shape letters: B batch, S sequence length, T tokens (= B * S), L MoE layers, E experts of a layer, K top-k.
"""

from fedgraft.types.messages import (
    Batch,
    Broadcast,
    Budget,
    ClientFailure,
    ClientGroup,
    ClientOutcome,
    ClientTask,
    ClientUpdate,
    EvaluationReply,
    EvaluationRow,
    EvaluationTask,
    Federation,
    RoundPlan,
    ServerState,
    TensorInfo,
    Weighted,
)
from fedgraft.types.model import (
    FROZEN,
    IGNORE_INDEX,
    PRIVATE,
    SHARED,
    AdapterSpec,
    Assignment,
    ExampleGateSpec,
    GraftSpec,
    Group,
    GroupKind,
    MixtureSpec,
    ModelFacts,
    ParamRef,
    Params,
    Projection,
    Slots,
    assigned,
)

__all__ = [
    "FROZEN",
    "IGNORE_INDEX",
    "PRIVATE",
    "SHARED",
    "AdapterSpec",
    "Assignment",
    "Batch",
    "Broadcast",
    "Budget",
    "ClientFailure",
    "ClientGroup",
    "ClientOutcome",
    "ClientTask",
    "ClientUpdate",
    "EvaluationReply",
    "EvaluationRow",
    "EvaluationTask",
    "ExampleGateSpec",
    "Federation",
    "GraftSpec",
    "Group",
    "GroupKind",
    "MixtureSpec",
    "ModelFacts",
    "ParamRef",
    "Params",
    "Projection",
    "RoundPlan",
    "ServerState",
    "Slots",
    "TensorInfo",
    "Weighted",
    "assigned",
]
