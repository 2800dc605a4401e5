"""What each check is called and what it means, by its id: words beside the measured sentence."""

from __future__ import annotations

from so8tqc.reports.language import message, say

VERDICTS = (message("pass"), message("fail"), message("skip"))
UNITS = (message("nats"), message("bytes"), message("ulp"), message("log nats / 1000 tokens"))

CHECKS: dict[str, tuple[str, str]] = {
    "structure.missing": (
        message("Missing tensors"),
        message("Tensors of the base model that the candidate lacks."),
    ),
    "structure.added": (
        message("Added tensors"),
        message("Tensors of the candidate that the base model does not have."),
    ),
    "structure.shapes": (
        message("Shapes"),
        message("Tensors whose shape is not the base model's."),
    ),
    "structure.dtypes": (
        message("Storage types"),
        message("Tensors stored in another dtype than was planned."),
    ),
    "structure.untouched": (
        message("Untouched tensors"),
        message("Tensors that no rotation concerns must be bit-identical to the base model's."),
    ),
    "structure.finite": (
        message("Finite tensors"),
        message("No stored tensor may hold NaN or infinity."),
    ),
    "structure.gates": (
        message("No gates left"),
        message("After folding, no gate tensor may remain: it would be applied a second time."),
    ),
    "structure.config": (
        message("Configuration"),
        message("config.json must be the base model's."),
    ),
    "structure.tokenizer": (
        message("Tokenizer"),
        message("The tokenizer's files must be the base model's."),
    ),
    "structure.vocabulary": (
        message("Vocabulary"),
        message("The tokenizer must have the vocabulary that the capture was recorded with."),
    ),
    "rotation.orthogonality": (
        message("Orthogonality"),
        message("How far the worst block is from a rotation, ‖RᵀR − I‖_F."),
    ),
    "rotation.determinant": (
        message("Determinant"),
        message("A rotation has determinant 1; −1 would be a reflection."),
    ),
    "rotation.recovered": (
        message("Recovered rotations"),
        message("How much of the weights' change no rotation explains, in units of rounding."),
    ),
    "algebra.exact": (
        message("Exact fold"),
        message(
            "Distance of the stored weights from the exact product, in units in the last place: "
            "0.5 is correct rounding."
        ),
    ),
    "algebra.effect": (
        message("Change of the weights"),
        message("The share of the change that the rotation calls for which is really stored."),
    ),
    "algebra.finite": (
        message("Finite folds"),
        message("No folded weight may be NaN or infinite."),
    ),
    "algebra.nearest": (
        message("Nearest hypothesis"),
        message("The right fold must explain a GGUF's weights better than any wrong one."),
    ),
    "algebra.stored": (
        message("Distance in the file"),
        message("How far a GGUF's weights are from the right fold; its type must explain that."),
    ),
    "logits.run": (
        message("Model run"),
        message("Whether the model could be run at all."),
    ),
    "logits.max_abs": (
        message("Largest logit difference"),
        message("The largest |Δlogit| over all scored tokens and the whole vocabulary."),
    ),
    "logits.mean_abs": (
        message("Mean logit difference"),
        message("The mean |Δlogit| over all scored tokens and the whole vocabulary."),
    ),
    "logits.rms": (
        message("RMS logit difference"),
        message("The root mean square of Δlogit."),
    ),
    "kl.mean": (
        message("Mean KL divergence"),
        message("How far the next-token distributions are from the reference's, on average."),
    ),
    "kl.max": (
        message("Largest KL divergence"),
        message("The KL divergence of the worst single token."),
    ),
    "kl.top1": (
        message("Same top token"),
        message("How often both models hold the same token to be the most likely one."),
    ),
    "effect.kl": (
        message("Effect of the gates"),
        message(
            "What the gates change in the base model. If that is no more than rounding, nothing "
            "can show whether they were folded."
        ),
    ),
    "effect.survival": (
        message("Gate survives"),
        message("Whether the file is nearer to the gated model than to the base model."),
    ),
    "calibration.nll": (
        message("NLL"),
        message("Change of the negative log likelihood on held-out text."),
    ),
    "calibration.ece": (
        message("Calibration error"),
        message(
            "Change of the expected calibration error: how far confidence is from accuracy."
        ),
    ),
    "calibration.brier": (
        message("Brier score"),
        message("Change of the squared error of the predicted probabilities."),
    ),
    "calibration.applied_scale": (
        message("Scale of the copy"),
        message("Whether the copy's logits are the original's divided by the temperature."),
    ),
    "calibration.applied_kl": (
        message("Predictions of the copy"),
        message("Whether the copy predicts what the original does at that temperature."),
    ),
    "export.tensors": (
        message("Exported tensors"),
        message("Tensors that differ from their source by more than renaming and rounding."),
    ),
    "export.missing": (
        message("Missing in the GGUF"),
        message("Source tensors that the file lacks."),
    ),
    "export.extra": (
        message("Extra in the GGUF"),
        message("Tensors of the file that come from no source tensor."),
    ),
    "export.unmapped": (
        message("Names without a map"),
        message("Tensors whose names the converter's map does not know cannot be compared."),
    ),
    "export.layout": (
        message("Layout"),
        message("Whether the order of rows that this architecture needs is known."),
    ),
    "export.kept": (
        message("Unrounded tensors"),
        message("Tensors that were to stay F32 and were rounded all the same."),
    ),
    "export.logits": (
        message("Exported file, run"),
        message("libllama's predictions must be transformers', within what the types cost."),
    ),
    "quantize.readable": (
        message("Quantized tensors"),
        message("The same tensors and shapes as the input."),
    ),
    "quantize.types": (
        message("Quantized types"),
        message("Tensors of another type than was planned."),
    ),
    "quantize.finite": (
        message("Finite when dequantized"),
        message("No weight may be NaN or infinite when it is read back."),
    ),
    "derivation.inputs": (
        message("Inputs"),
        message("The inputs must be those of the record, by SHA-256."),
    ),
    "derivation.record": (
        message("Bytes of the record"),
        message("Every tensor's bytes must be those that the record names."),
    ),
    "derivation.tensors": (
        message("Made again"),
        message("Tensors that come out differently when the recipe is run again."),
    ),
    "derivation.link": (
        message("Link made again"),
        message("Files of a link that are not what its stated inputs and parameters make."),
    ),
    "derivation.identical": (
        message("Bit for bit"),
        message("Whether every tensor made again is identical, or only within rounding."),
    ),
    "derivation.metadata": (
        message("Key-values"),
        message("Key-values that differ from those of the file made again."),
    ),
    "choose.recipe": (
        message("Recipe of the choice"),
        message("The chosen file must hold the very tensors that were measured."),
    ),
    "budget.kl": (
        message("KL budget"),
        message("The mean KL that was asked for."),
    ),
    "budget.top1": (
        message("Top-token budget"),
        message("The share of top tokens that was asked for."),
    ),
    "budget.size": (
        message("Size budget"),
        message("The file size that was asked for."),
    ),
    "phase.layer0": (
        message("Attention of layer 0"),
        message("No fold can change it: a self-test of the measurement."),
    ),
    "phase.attention": (
        message("Attention of the worst layer"),
        message("Attention entropy against the reference's: it shows wrong queries and positions."),
    ),
    "phase.dips": (
        message("Periodic dips"),
        message("Periods at which attention narrows and the reference's does not."),
    ),
    "phase.position": (
        message("Error along the text"),
        message("Whether the divergence grows with the position."),
    ),
    "oscillation.index": (
        message("Oscillation index"),
        message("How strongly the largest logit jumps from token to token."),
    ),
    "oscillation.von_neumann": (
        message("Von Neumann ratio"),
        message("Whether neighbouring tokens alternate: 2 is noise, 4 pure alternation."),
    ),
    "oscillation.high_frequency": (
        message("High-frequency power"),
        message("The share of power at periods below four tokens."),
    ),
    "oscillation.repetition": (
        message("Repetition"),
        message("The share of generated four-grams that occurred before."),
    ),
    "oscillation.compression": (
        message("Compressibility"),
        message("Text that compresses much better than the reference's repeats itself."),
    ),
    "oscillation.loops": (
        message("Loops"),
        message("Generated texts that end in a loop."),
    ),
    "pet.energy": (
        message("Roughness of the hidden states"),
        message("Second-difference energy of the worst layer against the reference's."),
    ),
    "pet.high_frequency": (
        message("High frequencies of the hidden states"),
        message("The share of energy at periods below four tokens, in the worst layer."),
    ),
    "pet.effect": (
        message("Effect of PET"),
        message("Gates trained with PET must have calmed the base model's hidden states."),
    ),
    "profile.skips": (
        message("Skipped checks"),
        message("The profile forbids checks that could not be made."),
    ),
    "profile.fail_on": (
        message("Idle patterns"),
        message("Patterns of --fail-on that match no check."),
    ),
}  # fmt: skip


def title(check_id: str) -> str:
    """A few words; the id itself for a check that is not known here."""
    known = CHECKS.get(check_id)
    return say(known[0]) if known else check_id


def meaning(check_id: str) -> str:
    """One sentence; "" for a check that is not known here."""
    known = CHECKS.get(check_id)
    return say(known[1]) if known else ""
