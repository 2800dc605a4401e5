"""What every check means, what its failure means, and what to do about it.

The one source of remedies: reports advise from here, ``services.diagnose`` names edits with these
words, and docs/checks.md is written from it (``python tests/docs/write_pages.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class Guide(NamedTuple):
    """One check.

    Attributes:
        measures: what the value is.
        failure: what it says about the file when it fails.
        remedy: what to do then, with a command where there is one.
    """

    measures: str
    failure: str
    remedy: str


REBAKE = "Bake again from the base model: so8tqc bake BASE ROTATIONS --out DIR"

_COPY = "Copy it from the base model, or bake again: so8tqc bake BASE ROTATIONS --out DIR"
_TRAIN = (
    "Look for the blocks that drifted in the training, or fold the nearest rotations: "
    "--orthogonalize polar."
)
_FILES_FIRST = (
    "See algebra.* and structure.* of the same file first: they name a wrong fold. If they pass, "
    "the file lost too much when it was rounded."
)
_FINER = (
    "A model directory: bake with --baked-dtype float32. A GGUF file: quantize to a finer type, or "
    "with --imatrix auto."
)
_EXPORT = (
    "Read the converter's log beside the GGUF, then export again: so8tqc export BAKED --out FILE"
)
_QUANTIZE = (
    "Check disk and memory, then quantize again: so8tqc quantize FILE.gguf --type T --out DIR"
)
_TEMPERATURE = "Do not apply this temperature; fit it on more text (--data FILE)."
_APPLY = "Do not ship the applied file: apply again from the original, and report it if it recurs."
_CHOOSE = "Allow more, or search more: other types (--type), more files (--max-evaluations)."
_EXPORT_BAKED = "Export the baked directory, not the base: so8tqc export BAKED --out FILE"
_MADE_AGAIN = "Do not trust the file: quantize again from the recorded input."
_LAYERS = "Look at the layers that pet.energy names."
_REPEATING = "Read the generated texts: they repeat what the reference does not."
_STIRRED = "That layer was stirred up after the training: bake again from the base model."

GUIDE: dict[str, Guide] = {
    # what the files are made of
    "structure.missing": Guide(
        "tensors of the base that the candidate lacks", "the directory is incomplete", REBAKE
    ),
    "structure.added": Guide(
        "tensors that the base does not have", "something else was written into it", REBAKE
    ),
    "structure.shapes": Guide(
        "tensors whose shape is not the base's", "another model, or an edited one", REBAKE
    ),
    "structure.dtypes": Guide(
        "tensors without a gate whose dtype is not the base's",
        "the whole model was converted, so that more than the fold was rounded",
        REBAKE,
    ),
    "structure.untouched": Guide(
        "tensors without a gate whose bytes are not the base's",
        "something besides the fold changed the model",
        REBAKE,
    ),
    "structure.finite": Guide(
        "changed tensors that hold NaN or infinity", "the file is damaged", REBAKE
    ),
    "structure.gates": Guide(
        "gate tensors that are left in the file",
        "a runtime that knows gates would rotate a second time",
        REBAKE,
    ),
    "structure.config": Guide(
        "values of config.json that are not the base's",
        "the same weights would be run as another model",
        _COPY,
    ),
    "structure.tokenizer": Guide(
        "tokenizer files that are not the base's", "texts would become other tokens", _COPY
    ),
    "structure.vocabulary": Guide(
        "whether the tokenizer's vocabulary is not the one that the capture recorded",
        "the same token ids mean other words",
        "Give the tokenizer of the training, or record the capture again.",
    ),
    # the rotations themselves
    "rotation.orthogonality": Guide(
        "largest ‖RᵀR − I‖_F of a block", "a block is no rotation: the training drifted", _TRAIN
    ),
    "rotation.determinant": Guide(
        "largest |det R − 1| of a block", "a block scales or mirrors", _TRAIN
    ),
    "rotation.recovered": Guide(
        "what no rotation explains of the candidate's weights, in units of their rounding",
        "the weights were changed by more than a rotation",
        "Compare with the right base, or treat the recovered rotations as an approximation.",
    ),
    # the fold, from the files alone
    "algebra.exact": Guide(
        "largest distance of a stored element from the exact fold W·R, in ulp",
        "something else was folded; the diagnosis says what",
        REBAKE,
    ),
    "algebra.effect": Guide(
        "smallest share of the expected change ‖W·R − W‖ that was really made",
        "a layer was not baked, or its storage dtype cannot hold the change",
        "Bake again from the base model, with --baked-dtype float32 if the gates are small.",
    ),
    "algebra.finite": Guide(
        "folded elements that are NaN or infinite",
        "the product does not fit the storage dtype, or the file is damaged",
        REBAKE + " --baked-dtype float32",
    ),
    "algebra.nearest": Guide(
        "layers of a GGUF file whose attention output another hypothesis explains better than "
        "the right fold",
        "the file was made from the base, or from a wrong bake",
        _EXPORT_BAKED,
    ),
    "algebra.stored": Guide(
        "largest distance of a GGUF file's attention output from the right fold, relative to its "
        "norm",
        "more was lost than the type explains: a wrong importance matrix, or noise",
        "Quantize again, with the importance matrix of this model: --imatrix auto.",
    ),
    # one model's logits against the other's
    "logits.run": Guide(
        "nothing: it is skipped where a file cannot be run",
        "its files are so damaged that its logits would mean nothing",
        "Mend what the checks that it names say.",
    ),
    "logits.max_abs": Guide("largest |Δlogit|", "some logit is off", _FILES_FIRST),
    "logits.mean_abs": Guide("mean |Δlogit|", "logits are off in general", _FILES_FIRST),
    "logits.rms": Guide("root mean square Δlogit", "logits are off in general", _FILES_FIRST),
    "kl.mean": Guide(
        "mean KL divergence from the reference, nats per token",
        "the candidate predicts something else than the trained model",
        f"{_FILES_FIRST} {_FINER}",
    ),
    "kl.max": Guide(
        "largest KL divergence of one token", "a single prediction is far off", _FILES_FIRST
    ),
    "kl.top1": Guide(
        "share of tokens with the reference's most likely next token",
        "greedy text will differ from the trained model's",
        f"{_FILES_FIRST} {_FINER}",
    ),
    "effect.kl": Guide(
        "mean KL of the base from the gated model, nats",
        "the gates change less than rounding does: no logits can show whether they were folded",
        "Train the gates further, or judge the files alone: so8tqc qc … --level files",
    ),
    "effect.survival": Guide(
        "upper end of KL to the gated model minus KL to the base",
        "the file is no nearer to the gated model than to the base: it was made from the unbaked "
        "model, or its quantization erased the gate",
        f"{_EXPORT_BAKED} (or choose a finer quantization type).",
    ),
    # probabilities
    "calibration.ece": Guide(
        "qc: the candidate's expected calibration error minus the reference's; calibrate: its "
        "held-out change by the temperature in use",
        "confidence has moved away from accuracy",
        f"qc: fit a temperature (so8tqc calibrate) or take a finer type. calibrate: {_TEMPERATURE}",
    ),
    "calibration.brier": Guide(
        "qc: the candidate's Brier score minus the reference's; calibrate: its held-out change by "
        "the temperature in use",
        "probabilities have become worse",
        f"qc: fit a temperature (so8tqc calibrate) or take a finer type. calibrate: {_TEMPERATURE}",
    ),
    "calibration.nll": Guide(
        "held-out change of the negative log-likelihood by the temperature in use, nats",
        "the temperature makes predictions worse",
        _TEMPERATURE,
    ),
    "calibration.applied_scale": Guide(
        "how far the applied file's logits are from the original's over T, in scale",
        "the file does not carry the temperature that it should",
        _APPLY,
    ),
    "calibration.applied_kl": Guide(
        "mean KL of the applied file's predictions from the original's at T, nats",
        "more than the temperature was changed",
        _APPLY,
    ),
    # GGUF files and where they come from
    "export.tensors": Guide(
        "tensors that are not their source, renamed, rearranged and rounded",
        "the conversion is wrong",
        _EXPORT,
    ),
    "export.missing": Guide(
        "source tensors that the file lacks", "the conversion is incomplete", _EXPORT
    ),
    "export.extra": Guide(
        "tensors that come from no source tensor", "something was invented or mixed in", _EXPORT
    ),
    "export.unmapped": Guide(
        "nothing: it is skipped and names source tensors whose names gguf-py does not know",
        "these tensors were not compared",
        "Judge the file by its logits: export.logits, so8tqc qc.",
    ),
    "export.layout": Guide(
        "nothing: it is skipped where the architecture's arrangement of rows is not known here",
        "any arrangement that explains the bytes was accepted",
        "Judge the file by its logits: export.logits, so8tqc qc.",
    ),
    "export.kept": Guide(
        "tensors that --keep-f32 names and that were rounded all the same",
        "the file does not hold what was asked for",
        _EXPORT,
    ),
    "export.logits": Guide(
        "mean KL of libllama's predictions from transformers' on 64 fixed tokens, nats",
        "the file is run as another model: RoPE, norms, rows or vocabulary differ",
        _EXPORT,
    ),
    "quantize.readable": Guide(
        "tensors that are missing, added or of another shape than the input's",
        "the file is damaged",
        _QUANTIZE,
    ),
    "quantize.types": Guide(
        "tensors of another type than libllama's dry run planned",
        "the file is not what was asked for",
        _QUANTIZE,
    ),
    "quantize.finite": Guide(
        "tensors that are not finite when dequantized", "the file is damaged", _QUANTIZE
    ),
    "choose.recipe": Guide(
        "tensors whose bytes are not those that were evaluated",
        "the file that was written is not the one that was judged",
        "Run the search again; without a second run the file's numbers are not known.",
    ),
    "budget.kl": Guide("mean KL of the chosen file, nats", "no file keeps this budget", _CHOOSE),
    "budget.top1": Guide(
        "share of the reference's top tokens that the chosen file keeps",
        "no file keeps this budget",
        _CHOOSE,
    ),
    "budget.size": Guide("size of the chosen file, bytes", "no file keeps this budget", _CHOOSE),
    "derivation.inputs": Guide(
        "inputs that are not those of the record, by SHA-256",
        "the file is made again from something else",
        "Give the recorded inputs: so8tqc verify FILE.gguf --input FILE --imatrix FILE",
    ),
    "derivation.record": Guide(
        "tensors whose bytes are not those that were recorded",
        "the file was changed after it was made, or the record belongs to another",
        _MADE_AGAIN,
    ),
    "derivation.metadata": Guide(
        "key-values that the file made again does not have",
        "its header was edited, or it is another file's",
        _MADE_AGAIN,
    ),
    "derivation.tensors": Guide(
        "tensors that are different when made again",
        "the recorded recipe did not make this file",
        _MADE_AGAIN,
    ),
    "derivation.identical": Guide(
        "nothing: it is skipped where tensors are within rounding, not identical",
        "another build of libllama, or another CPU, may round so",
        "Verify with the recorded build, on the recorded kind of CPU.",
    ),
    # long text
    "phase.layer0": Guide(
        "largest difference of layer 0's attention entropy from the reference's, nats",
        "positions, embeddings or layer 0's queries and keys are not the reference's",
        "No fold can change layer 0's attention: compare RoPE base and scaling in both "
        "config.json, the tokenizers and the embeddings.",
    ),
    "phase.attention": Guide(
        "mean difference of attention entropy from the reference's in the worst layer, nats",
        "something is wrong before the softmax of that layer",
        "Queries, keys or positions are wrong from that layer on: was a rotation applied to q_proj "
        "or k_proj? so8tqc qc names the fault in the weights.",
    ),
    "phase.dips": Guide(
        "periods at which attention entropy dips and the reference's does not",
        "a frequency of RoPE is treated differently",
        "Open the case's entropy plot: a peak at a dotted line is a RoPE wavelength.",
    ),
    "phase.position": Guide(
        "lower end of the slope of ln KL over position, per 1,000 tokens",
        "the error grows along the text",
        "The error grows along the text: compare RoPE scaling, context length and sliding window.",
    ),
    "oscillation.index": Guide(
        "lower end of the relative increase of mean |Δ²| of the largest logit",
        "logits jump more from token to token",
        "If von_neumann passed: a changed final norm, head or temperature.",
    ),
    "oscillation.von_neumann": Guide(
        "lower end of the relative increase of the von Neumann ratio of the largest logit",
        "neighbouring tokens disagree more",
        _LAYERS,
    ),
    "oscillation.high_frequency": Guide(
        "lower end of the relative increase of the power at periods below 4 tokens",
        "the largest logit alternates more",
        _LAYERS,
    ),
    "oscillation.repetition": Guide(
        "share of repeated 4-grams in generated texts, minus the reference's",
        "the texts loop",
        _REPEATING,
    ),
    "oscillation.compression": Guide(
        "how much better generated texts compress than the reference's, as a logarithm",
        "the texts repeat themselves with changes between",
        _REPEATING,
    ),
    "oscillation.loops": Guide(
        "loops in generated texts beyond the reference's, as a share of the texts",
        "the texts end in loops",
        "Read the generated texts: they loop where the reference's do not.",
    ),
    "pet.energy": Guide(
        "largest relative increase of a layer's second-difference energy over the reference",
        "hidden states of that layer oscillate",
        _STIRRED,
    ),
    "pet.high_frequency": Guide(
        "largest relative increase of a layer's share of energy at periods below 4 tokens",
        "hidden states of that layer oscillate fast",
        _STIRRED,
    ),
    "pet.effect": Guide(
        "upper end of the change of the hidden states' oscillation against the base model",
        "the gates' record says PET, and the hidden states do not",
        "The gates do not show what their PET record promises: check that the right file was "
        "baked, or train with a stronger penalty.",
    ),
    # how the verdict was asked for
    "profile.fail_on": Guide(
        "patterns of --fail-on that match no check of the run",
        "what should decide was not measured",
        "Correct the pattern; the record lists the checks of the run.",
    ),
    "profile.skips": Guide(
        "checks that were skipped under a profile with skips: forbid",
        "something was not proved",
        "Mend what made them skip (each says it), or allow them by name: --allow CHECK.",
    ),
    # a statement and its files
    "attest.verdicts": Guide(
        "stages whose own checks failed",
        "the statement is true, and says of a link that it did not pass",
        "See the record of that stage before you ship: so8tqc report DIR",
    ),
    "statement.files": Guide(
        "files that are here and not as stated",
        "a file was changed after it was attested, or is another file",
        "Get the named files again, or attest the run anew: so8tqc attest DIR",
    ),
    "statement.strangers": Guide(
        "files in the model directory that the statement does not name",
        "somebody added a file that the run did not make",
        "Remove them: a runtime may read them.",
    ),
    "statement.absent": Guide(
        "files of the statement that are not here",
        "it never fails; it says what was not looked at",
        "Say where the files are: --files DIR",
    ),
    "statement.verdicts": Guide(
        "links whose own checks failed when they were made",
        "whoever made the files shipped them in spite of a failed check",
        "Ask them for the records (record.json) and read the failed checks.",
    ),
    "derivation.link": Guide(
        "files of a link that are not what its inputs and parameters make",
        "the file does not come from where the statement says",
        "Do not trust the file. If --base or --rotations may be others than the stated ones, check "
        "them first.",
    ),
    "files.changed": Guide(
        "files of a run that are not as its manifest says",
        "a file was changed after it was made",
        "Run again; changed stages are made anew: so8tqc run CONFIG",
    ),
    "files.missing": Guide(
        "files of a run that are gone",
        "a file was moved or deleted after it was made",
        "Run again; missing stages are made anew: so8tqc run CONFIG",
    ),
    # two runs
    "comparison.new_failures": Guide(
        "checks that fail in the second run and did not fail in the first",
        "something got worse between the two runs",
        "Read what changed in inputs, config and versions, at the top of the comparison.",
    ),
}
"""Every check that a stage of so8tqc can judge or skip."""
