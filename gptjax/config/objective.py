"""Knobs of what is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from gptjax.config.knobs import knob


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted and what it costs."""

    name: str = knob("causal", "Batch to inputs, targets and weights.", choices=("causal",))
    z_loss: float = knob(0.0, "Weight of the squared log-normaliser (PaLM uses 1e-4).", at_least=0)
    label_smoothing: float = knob(0.0, "Share of the target's probability spread over the vocabulary.", at_least=0, below=1)
    router_balance_loss: float = knob(
        0.0, "Weight of the experts' load-balancing loss, 1 where the load is even (Switch Transformer uses 0.01).", at_least=0
    )
    router_z_loss: float = knob(0.0, "Weight of the router's squared log-normaliser (ST-MoE uses 0.001).", at_least=0)
    prediction_heads_weight: float = knob(1.0, "Weight of the loss of each of model.prediction_heads but the first.", at_least=0)
    loss_chunk: int = knob(0, "Positions whose logits are held at once in training; 0: chosen from the shapes.", at_least=0)
