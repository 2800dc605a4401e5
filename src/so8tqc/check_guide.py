"""What checks, diagnoses, profiles and exit codes mean, and what to do about them.

The one source of these words: ``so8tqc explain`` prints them, reports show and advise from here,
``services.weights.diagnose`` names edits with them, and docs/checks.md is written from it
(``python tests/docs/write_pages.py``). All of them are messages, which ``reports/languages``
translates.
"""

from __future__ import annotations

from typing import NamedTuple

from so8tqc.errors import ExitCode


class Guide(NamedTuple):
    """One check.

    Attributes:
        title: a few words.
        meaning: one sentence, what the value is.
        failure: what it says about the file when it fails.
        remedy: what to do then, with a command where there is one.
    """

    title: str
    meaning: str
    failure: str
    remedy: str


class Fault(NamedTuple):
    """One diagnosis: what was done to the weights instead of the right fold.

    Attributes:
        finding: what a diagnosis says before what was measured.
        evidence: one sentence, how it is told from other faults.
        remedy: what to do then, with a command where there is one.
    """

    finding: str
    evidence: str
    remedy: str


class Note(NamedTuple):
    """One profile, or one exit code.

    Attributes:
        title: a few words.
        meaning: one or two sentences.
        remedy: what to do then; of a profile, how it is chosen.
    """

    title: str
    meaning: str
    remedy: str


REBAKE = "Bake again from the base model: so8tqc bake BASE ROTATIONS --out DIR"

AS_TRAINED = "Bake again as in training:"
JUDGE_AGAIN = "Judge again with the reading of the training:"
SEE_READINGS = "Give the base and the rotations that were recorded. What these give, each reading:"
BEFORE_COMMANDS = (AS_TRAINED, JUDGE_AGAIN, SEE_READINGS)
"""Remedies that a command line follows, which states parametrization, convention and site."""

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
        "Missing tensors",
        "Tensors of the base model that the candidate lacks.",
        "the directory is incomplete",
        REBAKE,
    ),
    "structure.added": Guide(
        "Added tensors",
        "Tensors of the candidate that the base model does not have.",
        "something else was written into it",
        REBAKE,
    ),
    "structure.shapes": Guide(
        "Shapes",
        "Tensors whose shape is not the base model's.",
        "another model, or an edited one",
        REBAKE,
    ),
    "structure.dtypes": Guide(
        "Storage types",
        "Tensors stored in another dtype than was planned.",
        "the whole model was converted, so that more than the fold was rounded",
        REBAKE,
    ),
    "structure.untouched": Guide(
        "Untouched tensors",
        "Tensors that no rotation concerns must be bit-identical to the base model's.",
        "something besides the fold changed the model",
        REBAKE,
    ),
    "structure.finite": Guide(
        "Finite tensors",
        "No stored tensor may hold NaN or infinity.",
        "the file is damaged",
        REBAKE,
    ),
    "structure.gates": Guide(
        "No gates left",
        "After folding, no gate tensor may remain: it would be applied a second time.",
        "a runtime that knows gates would rotate a second time",
        REBAKE,
    ),
    "structure.config": Guide(
        "Configuration",
        "config.json must be the base model's.",
        "the same weights would be run as another model",
        _COPY,
    ),
    "structure.tokenizer": Guide(
        "Tokenizer",
        "The tokenizer's files must be the base model's.",
        "texts would become other tokens",
        _COPY,
    ),
    "structure.processor": Guide(
        "Processor and template",
        "The files that turn pictures and conversations into input must be the base model's.",
        "pictures would be scaled or normalised otherwise, or a conversation rendered otherwise",
        _COPY,
    ),
    "structure.vocabulary": Guide(
        "Vocabulary",
        "The tokenizer must have the vocabulary that the capture was recorded with.",
        "the same token ids mean other words",
        "Give the tokenizer of the training, or record the capture again.",
    ),
    # the rotations themselves
    "rotation.orthogonality": Guide(
        "Orthogonality",
        "How far the worst block is from a rotation, ‖RᵀR − I‖_F.",
        "a block is no rotation: the training drifted",
        _TRAIN,
    ),
    "rotation.determinant": Guide(
        "Determinant",
        "A rotation has determinant 1; −1 would be a reflection.",
        "a block scales or mirrors",
        _TRAIN,
    ),
    "rotation.recovered": Guide(
        "Recovered rotations",
        "How much of the weights' change no rotation explains, in units of rounding.",
        "the weights were changed by more than a rotation",
        "Compare with the right base, or treat the recovered rotations as an approximation.",
    ),
    # the fold, from the files alone
    "algebra.exact": Guide(
        "Exact fold",
        "Distance of the stored weights from the exact product, in units in the last place: 0.5 is "
        "correct rounding.",
        "something else was folded; the diagnosis says what",
        REBAKE,
    ),
    "algebra.projection": Guide(
        "Projection as it is run",
        "One layer's projection, run as transformers runs it: with its gate, and with the gate "
        "folded into the weight.",
        "the weight is not used as it was folded: it is stored the other way round, or its module "
        "is no plain matrix",
        "The model cannot be baked by this tool; report it with its config.json.",
    ),
    "algebra.effect": Guide(
        "Change of the weights",
        "The share of the change that the rotation calls for which is really stored.",
        "a layer was not baked, or its storage dtype cannot hold the change",
        "Bake again from the base model, with --baked-dtype float32 if the gates are small.",
    ),
    "algebra.finite": Guide(
        "Finite folds",
        "No folded weight may be NaN or infinite.",
        "the product does not fit the storage dtype, or the file is damaged",
        REBAKE + " --baked-dtype float32",
    ),
    "algebra.nearest": Guide(
        "Nearest hypothesis",
        "The right fold must explain a GGUF's weights better than any wrong one.",
        "the file was made from the base, or from a wrong bake",
        _EXPORT_BAKED,
    ),
    # a GGUF file's tensors, one by one
    "tensors.honest": Guide(
        "Tensors of the file",
        "How many tensors of a GGUF are not what an honest encoder of their type stores of the "
        "weights that they must stand for.",
        "a tensor was edited, damaged, exchanged, or made from an already quantized file",
        _EXPORT_BAKED,
    ),
    "tensors.missing": Guide(
        "Tensors missing in the file",
        "Tensors that the converter makes of the model and that the file lacks.",
        "the file is a part of a model, or was made from another",
        _EXPORT_BAKED,
    ),
    "tensors.extra": Guide(
        "Tensors beside the model's",
        "Tensors of a GGUF that come from no tensor of the model.",
        "the file was made from another model, or something was added to it",
        _EXPORT_BAKED,
    ),
    "tensors.keys": Guide(
        "Keys of the file",
        "How many keys of a GGUF that reach the logits of a text are others than the converter "
        "writes for the model.",
        "the file was made from another model or with another converter, or its keys were edited",
        _EXPORT_BAKED,
    ),
    "tensors.seen": Guide(
        "Tensors not looked at",
        "Tensors of a GGUF of which nobody says what they must hold.",
        "these tensors were not judged",
        "Install the converter: so8tqc vendor. Or judge the file by its logits: so8tqc qc … "
        "--level full",
    ),
    # where two models part
    "locate.operations": Guide(
        "Operations of a layer",
        "How many operations of the candidate, each on what the reference's is given, are not what "
        "its stored types and the arithmetic make of the reference's.",
        "an operation has other weights, or its configuration or key says something else",
        "Mend what the cause says, in the model or in its export: so8tqc export BAKED --out FILE",
    ),
    "locate.layers": Guide(
        "Layers by themselves",
        "How many layers of the candidate, each given what the reference's layer is given, make "
        "something else than rounding explains.",
        "the layer computes something else than the reference's",
        "Look at the operations of the first of these layers.",
    ),
    "locate.seen": Guide(
        "Operations not looked at",
        "What of the candidate could not be run beside the reference.",
        "this part was not judged",
        "Judge it by its logits: so8tqc qc … --level full",
    ),
    "locate.runtime": Guide(
        "libllama's own values",
        "How many of libllama's intermediate values are not what rounding activations makes of the "
        "file's own weights, on what libllama's operation or layer was given.",
        "libllama computes something else than the file's weights and keys say to transformers",
        "Look at the keys that this operation depends on, or judge with another libllama.",
    ),
    "locate.runtime_seen": Guide(
        "Values of libllama not looked at",
        "Values that libllama's graph of this architecture calls otherwise, or does not make.",
        "these values were not judged",
        "Judge the file by its logits: so8tqc qc … --level full",
    ),
    # one model's logits against the other's
    "logits.run": Guide(
        "Model run",
        "Whether the model could be run at all.",
        "libllama cannot load it, or its files are so damaged that its logits would mean nothing",
        "Mend what the checks that it names say.",
    ),
    "logits.max_abs": Guide(
        "Largest logit difference",
        "The largest |Δlogit| over all scored tokens and the whole vocabulary.",
        "some logit is off",
        _FILES_FIRST,
    ),
    "logits.mean_abs": Guide(
        "Mean logit difference",
        "The mean |Δlogit| over all scored tokens and the whole vocabulary.",
        "logits are off in general",
        _FILES_FIRST,
    ),
    "logits.rms": Guide(
        "RMS logit difference",
        "The root mean square of Δlogit.",
        "logits are off in general",
        _FILES_FIRST,
    ),
    "kl.mean": Guide(
        "Mean KL divergence",
        "How far the next-token distributions are from the reference's, on average.",
        "the candidate predicts something else than the trained model",
        f"{_FILES_FIRST} {_FINER}",
    ),
    "chat.template": Guide(
        "Chat template",
        "How many conversations the file's own chat template renders otherwise than the "
        "tokenizer's.",
        "a runtime that takes the file's template will not serve what was measured",
        "Export again from a directory whose tokenizer has the right chat template: "
        "so8tqc export BAKED --out FILE",
    ),
    "kl.max": Guide(
        "Largest KL divergence",
        "The KL divergence of the worst single token.",
        "a single prediction is far off",
        _FILES_FIRST,
    ),
    "kl.top1": Guide(
        "Same top token",
        "How often both models hold the same token to be the most likely one.",
        "greedy text will differ from the trained model's",
        f"{_FILES_FIRST} {_FINER}",
    ),
    "images.kl": Guide(
        "KL divergence after pictures",
        "The mean KL divergence of the tokens that a picture conditions, apart from all others.",
        "what the model says of pictures differs from what the trained model says",
        "Read the diagnosis: whether text alone is right tells the text model from what it is "
        "shown.",
    ),
    "images.top1": Guide(
        "Same top token after pictures",
        "How often both models hold the same token to be the most likely one after a picture.",
        "greedy text about pictures will differ from the trained model's",
        f"{_FILES_FIRST} {_FINER}",
    ),
    "images.rope_sections": Guide(
        "Sections of the rope",
        "A GGUF file must share its rotary pairs among time, height and width as the model does.",
        "every picture's rows and columns would be exchanged; text shows nothing of it",
        _EXPORT,
    ),
    "effect.kl": Guide(
        "Effect of the gates",
        "What the gates change in the base model. If that is no more than rounding, nothing can "
        "show whether they were folded.",
        "the gates change less than rounding does: no logits can show whether they were folded",
        "Train the gates further, or judge the files alone: so8tqc qc … --level files",
    ),
    "floor.plausible": Guide(
        "Noise floor beside the effect",
        "What rounding alone changes, as a share of what the gates change. A floor that is not "
        "small beside the effect is no limit.",
        "the floor says nothing: the gates do too little, or what it was measured with is wrong",
        "Bake with --baked-dtype float32, or judge the files alone: so8tqc qc … --level files",
    ),
    "kl.floor": Guide(
        "KL beside the quantization floor",
        "The mean KL of a quantized file beside that of the same types, encoded by plain rounding "
        "from the reference's own weights and run on the same tokens: what these types cost this "
        "model. Importance and compensation lose less than that.",
        "the file loses more than its types cost an honest encoder: it was made from a coarser "
        "file, or its weights are not the reference's",
        "Quantize again, from the F16 export of the baked directory: so8tqc quantize FILE.gguf "
        "--type Q8_0 --out DIR",
    ),
    "effect.survival": Guide(
        "Gate survives",
        "Whether the file is nearer to the gated model than to the base model.",
        "the file is no nearer to the gated model than to the base: it was made from the unbaked "
        "model, or its quantization erased the gate",
        f"{_EXPORT_BAKED} (or choose a finer quantization type).",
    ),
    # probabilities
    "calibration.ece": Guide(
        "Calibration error",
        "Change of the expected calibration error: how far confidence is from accuracy.",
        "confidence has moved away from accuracy",
        f"qc: fit a temperature (so8tqc calibrate) or take a finer type. calibrate: {_TEMPERATURE}",
    ),
    "calibration.brier": Guide(
        "Brier score",
        "Change of the squared error of the predicted probabilities.",
        "probabilities have become worse",
        f"qc: fit a temperature (so8tqc calibrate) or take a finer type. calibrate: {_TEMPERATURE}",
    ),
    "calibration.nll": Guide(
        "NLL",
        "Change of the negative log likelihood on held-out text.",
        "probabilities have become worse",
        f"qc: fit a temperature (so8tqc calibrate) or take a finer type. calibrate: {_TEMPERATURE}",
    ),
    "calibration.applied_scale": Guide(
        "Scale of the copy",
        "Whether the copy's logits are the original's divided by the temperature.",
        "the file does not carry the temperature that it should",
        _APPLY,
    ),
    "calibration.applied_kl": Guide(
        "Predictions of the copy",
        "Whether the copy predicts what the original does at that temperature.",
        "more than the temperature was changed",
        _APPLY,
    ),
    # GGUF files and where they come from
    "export.tensors": Guide(
        "Exported tensors",
        "Tensors that differ from their source by more than renaming and rounding.",
        "the conversion is wrong",
        _EXPORT,
    ),
    "export.missing": Guide(
        "Missing in the GGUF",
        "Source tensors that the file lacks.",
        "the conversion is incomplete",
        _EXPORT,
    ),
    "export.extra": Guide(
        "Extra in the GGUF",
        "Tensors of the file that come from no source tensor.",
        "something was invented or mixed in",
        _EXPORT,
    ),
    "export.unmapped": Guide(
        "Names without a map",
        "Tensors whose names the converter's map does not know cannot be compared.",
        "these tensors were not compared",
        "Judge the file by its logits: export.logits, so8tqc qc.",
    ),
    "export.traced": Guide(
        "History of the conversion",
        "Tensors whose making cannot be repeated from what the converter did.",
        "these tensors were not compared",
        "Judge the file by its logits: export.logits, so8tqc qc.",
    ),
    "export.layout": Guide(
        "Layout",
        "Whether the order of rows that this architecture needs is known.",
        "any arrangement that explains the bytes was accepted",
        "Judge the file by its logits: export.logits, so8tqc qc.",
    ),
    "export.kept": Guide(
        "Unrounded tensors",
        "Tensors that were to stay F32 and were rounded all the same.",
        "the file does not hold what was asked for",
        _EXPORT,
    ),
    "export.mmproj": Guide(
        "Vision tower",
        "A model that takes pictures has its vision tower and projector in a file beside the text.",
        "a runtime that has the text file alone cannot be shown a picture",
        "Export without --text-only, from a directory with the processor's files, by a converter "
        "that knows the model.",
    ),
    "export.mmproj_constants": Guide(
        "Normalisation of pixels",
        "The vision file's mean and standard deviation must be those of the model's processor.",
        "every picture would reach the vision tower in other colours",
        _EXPORT,
    ),
    "export.mmproj_width": Guide(
        "Width of the projector",
        "The projector must give as many features as the text file takes.",
        "the two files do not belong together, and no runtime loads them",
        _EXPORT,
    ),
    "export.logits": Guide(
        "Exported file, run",
        "libllama's predictions must be transformers', within what the types cost.",
        "the file is run as another model: RoPE, norms, rows or vocabulary differ",
        _EXPORT,
    ),
    "export.logits_max": Guide(
        "Exported file, largest difference",
        "The largest difference of one of libllama's logits from transformers', within what the "
        "types cost. A saturated model shows in it what its probabilities hide.",
        "the file is run as another model: RoPE, norms, rows or vocabulary differ",
        _EXPORT,
    ),
    "quantize.readable": Guide(
        "Quantized tensors",
        "The same tensors and shapes as the input.",
        "the file is damaged",
        _QUANTIZE,
    ),
    "quantize.types": Guide(
        "Quantized types",
        "Tensors of another type than was planned.",
        "the file is not what was asked for",
        _QUANTIZE,
    ),
    "quantize.finite": Guide(
        "Finite when dequantized",
        "No weight may be NaN or infinite when it is read back.",
        "the file is damaged",
        _QUANTIZE,
    ),
    "choose.recipe": Guide(
        "Recipe of the choice",
        "The chosen file must hold the very tensors that were measured.",
        "the file that was written is not the one that was judged",
        "Run the search again; without a second run the file's numbers are not known.",
    ),
    "budget.kl": Guide(
        "KL budget", "The mean KL that was asked for.", "no file keeps this budget", _CHOOSE
    ),
    "budget.top1": Guide(
        "Top-token budget",
        "The share of top tokens that was asked for.",
        "no file keeps this budget",
        _CHOOSE,
    ),
    "budget.size": Guide(
        "Size budget", "The file size that was asked for.", "no file keeps this budget", _CHOOSE
    ),
    "derivation.inputs": Guide(
        "Inputs",
        "The inputs must be those of the record, by SHA-256.",
        "the file is made again from something else",
        "Give the recorded inputs: so8tqc verify FILE.gguf --input FILE --imatrix FILE",
    ),
    "derivation.record": Guide(
        "Bytes of the record",
        "Every tensor's bytes must be those that the record names.",
        "the file was changed after it was made, or the record belongs to another",
        _MADE_AGAIN,
    ),
    "derivation.metadata": Guide(
        "Key-values",
        "Key-values that differ from those of the file made again.",
        "its header was edited, or it is another file's",
        _MADE_AGAIN,
    ),
    "derivation.tensors": Guide(
        "Made again",
        "Tensors that come out differently when the recipe is run again.",
        "the recorded recipe did not make this file",
        _MADE_AGAIN,
    ),
    "derivation.identical": Guide(
        "Bit for bit",
        "Whether every tensor made again is identical, or only within rounding.",
        "another build of libllama, or another CPU, may round so",
        "Verify with the recorded build, on the recorded kind of CPU.",
    ),
    # long text
    "phase.layer0": Guide(
        "Attention of layer 0",
        "No fold can change it: a self-test of the measurement.",
        "positions, embeddings or layer 0's queries and keys are not the reference's",
        "No fold can change layer 0's attention: compare RoPE base and scaling in both "
        "config.json, the tokenizers and the embeddings.",
    ),
    "phase.attention": Guide(
        "Attention of the worst layer",
        "Attention entropy against the reference's: it shows wrong queries and positions.",
        "something is wrong before the softmax of that layer",
        "Queries, keys or positions are wrong from that layer on: was a rotation applied to q_proj "
        "or k_proj? so8tqc qc names the fault in the weights.",
    ),
    "phase.dips": Guide(
        "Periodic dips",
        "Periods at which attention narrows and the reference's does not.",
        "a frequency of RoPE is treated differently",
        "Open the case's entropy plot: a peak at a dotted line is a RoPE wavelength.",
    ),
    "phase.position": Guide(
        "Error along the text",
        "Whether the divergence grows with the position.",
        "the error grows along the text",
        "The error grows along the text: compare RoPE scaling, context length and sliding window.",
    ),
    "oscillation.index": Guide(
        "Oscillation index",
        "How strongly the largest logit jumps from token to token.",
        "logits jump more from token to token",
        "If von_neumann passed: a changed final norm, head or temperature.",
    ),
    "oscillation.von_neumann": Guide(
        "Von Neumann ratio",
        "Whether neighbouring tokens alternate: 2 is noise, 4 pure alternation.",
        "neighbouring tokens disagree more",
        _LAYERS,
    ),
    "oscillation.high_frequency": Guide(
        "High-frequency power",
        "The share of power at periods below four tokens.",
        "the largest logit alternates more",
        _LAYERS,
    ),
    "oscillation.repetition": Guide(
        "Repetition",
        "The share of generated four-grams that occurred before.",
        "the texts loop",
        _REPEATING,
    ),
    "oscillation.compression": Guide(
        "Compressibility",
        "Text that compresses much better than the reference's repeats itself.",
        "the texts repeat themselves with changes between",
        _REPEATING,
    ),
    "oscillation.loops": Guide(
        "Loops",
        "Generated texts that end in a loop.",
        "the texts end in loops",
        "Read the generated texts: they loop where the reference's do not.",
    ),
    "pet.energy": Guide(
        "Roughness of the hidden states",
        "Second-difference energy of the worst layer against the reference's.",
        "hidden states of that layer oscillate",
        _STIRRED,
    ),
    "pet.high_frequency": Guide(
        "High frequencies of the hidden states",
        "The share of energy at periods below four tokens, in the worst layer.",
        "hidden states of that layer oscillate fast",
        _STIRRED,
    ),
    "pet.effect": Guide(
        "Effect of PET",
        "Gates trained with PET must have calmed the base model's hidden states.",
        "the gates' record says PET, and the hidden states do not",
        "The gates do not show what their PET record promises: check that the right file was "
        "baked, or train with a stronger penalty.",
    ),
    # which reading of a gate file was trained
    "identify.reading": Guide(
        "One reading",
        "How many readings of the gates the recorded logits, or the text, support.",
        "no reading agrees, or more than one does",
        "Give logits that the training recorded: so8tqc identify BASE ROTATIONS --capture FILE. "
        "Or state what is known of the gates: --parametrization, --convention, --site.",
    ),
    # how the verdict was asked for
    "profile.fail_on": Guide(
        "Idle patterns",
        "Patterns of --fail-on that match no check.",
        "what should decide was not measured",
        "Correct the pattern; the record lists the checks of the run.",
    ),
    "profile.skips": Guide(
        "Skipped checks",
        "The profile forbids checks that could not be made.",
        "something was not proved",
        "Mend what made them skip (each says it), or allow them by name: --allow CHECK.",
    ),
    # a statement and its files
    "attest.verdicts": Guide(
        "Verdicts of the run",
        "Stages whose own checks failed: the statement is true, and says so.",
        "the statement is true, and says of a link that it did not pass",
        "See the record of that stage before you ship: so8tqc report DIR",
    ),
    "statement.files": Guide(
        "Files of the statement",
        "Files that are not those of the statement, by SHA-256.",
        "a file was changed after it was attested, or is another file",
        "Get the named files again, or attest the run anew: so8tqc attest DIR",
    ),
    "statement.strangers": Guide(
        "Unknown files",
        "Files in the model directory that the statement does not name.",
        "somebody added a file that the run did not make",
        "Remove them: a runtime may read them.",
    ),
    "statement.absent": Guide(
        "Absent files",
        "Files of the statement that are not here: it says what was not looked at.",
        "it never fails; it says what was not looked at",
        "Say where the files are: --files DIR",
    ),
    "statement.origin": Guide(
        "Origin of the statement",
        "Whether the statement leads back to a base model.",
        "it begins with a file of which it says nothing",
        "Attest where the records of its bake and export lie beside it: so8tqc attest FILE",
    ),
    "statement.verdicts": Guide(
        "Stated verdicts",
        "Links whose own checks failed when they were made.",
        "whoever made the files shipped them in spite of a failed check",
        "Ask them for the records (record.json) and read the failed checks.",
    ),
    "derivation.link": Guide(
        "Link made again",
        "Files of a link that are not what its inputs and parameters make.",
        "the file does not come from where the statement says",
        "Do not trust the file. If --base or --rotations may be others than the stated ones, check "
        "them first.",
    ),
    "file.finite": Guide(
        "Finite weights of a file",
        "Tensors of a file that hold a NaN or an infinity, quantized ones after dequantizing.",
        "the file is damaged, or was made from weights that are",
        "Copy it again, or make it again from what it was made from; so8tqc check names that.",
    ),
    "file.recorded": Guide(
        "As its record says",
        "Parts of a file that are not what the record beside it says was made, by SHA-256.",
        "the file was changed after it was made, or another has taken its place",
        "Make it again by the command that so8tqc check ends with, or give the right record.",
    ),
    "file.verdicts": Guide(
        "Verdicts on the way",
        "Commands on the way from the base to a file whose own checks failed.",
        "something it was made from was already found wrong",
        "See the record of that command; mend what it names, and make what followed again.",
    ),
    "file.tokens": Guide(
        "Tokens of a file",
        "Tokens of a GGUF file that the tokenizer gives another id.",
        "the file has the vocabulary of another model: every text says something else to it",
        "Export it again from a directory with the right tokenizer: so8tqc export MODEL --out FILE",
    ),
    "file.belongs": Guide(
        "Belongs to its reference",
        "Whether a file can be compared with the model that it is said to come from.",
        "it is another model, or one with other tokens or layers",
        "Give the model that it was made from: so8tqc check BASE FILE",
    ),
    "files.changed": Guide(
        "Changed files",
        "Files of the run that are not as its manifest says, by SHA-256.",
        "a file was changed after it was made",
        "Run again; changed stages are made anew: so8tqc run CONFIG",
    ),
    "files.missing": Guide(
        "Missing files",
        "Files of the run that are gone.",
        "a file was moved or deleted after it was made",
        "Run again; missing stages are made anew: so8tqc run CONFIG",
    ),
    # two runs
    "comparison.new_failures": Guide(
        "New failures",
        "Checks that fail in the second run and did not fail in the first.",
        "something got worse between the two runs",
        "Read what changed in inputs, config and versions, at the top of the comparison.",
    ),
}
"""Every check that a stage of so8tqc can judge or skip."""

DIAGNOSES: dict[str, Fault] = {
    "not_baked": Fault(
        "The gate was never folded in",
        "The base model's own weight explains what is stored better than any fold.",
        REBAKE,
    ),
    "layer_missing": Fault(
        "The gate was not folded in some layers",
        "Some layers hold the base model's weight, the others hold a fold.",
        REBAKE,
    ),
    "transposed": Fault(
        "The transposed rotation was folded",
        "Rᵀ explains the stored weight, R does not: column and row were mistaken for one another.",
        AS_TRAINED,
    ),
    "double_baked": Fault(
        "The rotation was folded twice",
        "R·R, or Rᵀ·Rᵀ, explains the stored weight: what was baked was a baked model.",
        REBAKE + " (from the unbaked base).",
    ),
    "wrong_parametrization": Fault(
        "The rotation was made from theta by another parametrization",
        "What another parametrization makes of the same theta explains the stored weight.",
        AS_TRAINED,
    ),
    "layers_permuted": Fault(
        "Layers were interchanged",
        "The rotation, or the baked weight, of another layer explains what is stored here.",
        REBAKE,
    ),
    "blocks_permuted": Fault(
        "The blocks of the rotation were folded in another order",
        "The layer's own 8×8 blocks explain the stored weight, each at another block's place.",
        REBAKE,
    ),
    "wrong_site": Fault(
        "The rotation was folded on the other side of the projection",
        "The rotation explains the stored weight as a gate behind the projection where it belongs "
        "before it, or the other way round.",
        AS_TRAINED,
    ),
    "foreign_edit": Fault(
        "Something else was changed",
        "A tensor that no gate concerns differs from the base model's, or a change that no "
        "rotation explains was stored in one.",
        REBAKE,
    ),
    "coarser_source": Fault(
        "The file was made from an already quantized one",
        "What another type makes of the weights explains the codes; the weights themselves do not.",
        "Quantize the model's F16 export, not a file that is quantized already.",
    ),
    "other_tensor": Fault(
        "A tensor holds what belongs elsewhere",
        "The weights of another tensor of the file, or the base's own where a bake has changed "
        "them, explain every code.",
        "Export again, from the right directory: so8tqc export BAKED --out FILE",
    ),
    "damaged_tensor": Fault(
        "A tensor is damaged",
        "Stored weights are NaN, infinite or all zero.",
        "Copy the file again, or quantize the F16 export again.",
    ),
    "non_finite": Fault(
        "There are NaN or infinite values",
        "Elements of a stored weight are NaN or infinite.",
        REBAKE + " --baked-dtype float32",
    ),
    "non_orthogonal": Fault(
        "What was folded is no rotation",
        "Matrices that scale or shear explain the stored weight, and no rotation does.",
        REBAKE + " (--orthogonalize polar if the trained matrices themselves have drifted).",
    ),
    "misread": Fault(
        "The rotations are read otherwise than they were trained",
        "Recorded logits agree with another reading of the gate file than the one in use, or with "
        "none: parametrization, convention or site was stated wrongly.",
        AS_TRAINED,
    ),
    "conversion": Fault(
        "The file was converted wrongly",
        "A file whose types only round has lost far more than rounding does: a tensor is not what "
        "the converter makes of its source, or the keys belong to another model.",
        _EXPORT,
    ),
    "wrong_on_images": Fault(
        "Right on text, and wrong on what follows a picture",
        "The text model gives the trained one's logits before any picture, and others after one: "
        "positions, attention inside pictures, or what is put in their place.",
        _EXPORT,
    ),
    "rope_sections": Fault(
        "The rope is shared out among other sections",
        "Time, height and width of a picture's positions turn other pairs of features than in the "
        "trained model. On text all three are equal, so that it shows nothing.",
        _EXPORT,
    ),
    "gates_off_images": Fault(
        "The recorded model applied its gates to text alone",
        "Base and gates agree with the capture before pictures; after them they do when the gates "
        "leave the positions of pictures as they are. A fold acts on every position.",
        "Train with the gates at all positions: no fold can tell a picture's from a text's.",
    ),
    "wrong_operation": Fault(
        "An operation makes something else than the reference's",
        "On the reference's own input it differs by more than the stored types and the arithmetic "
        "explain; a known mistake, made on the reference's operation, gives the same.",
        "Mend what the cause says, in the model or in its export: so8tqc export BAKED --out FILE",
    ),
    "runtime_differs": Fault(
        "libllama makes something else of the file than its weights say",
        "On the same input, a value of libllama's differs from what transformers makes of the "
        "file's weights by more than rounding activations explains.",
        "Look at the keys that this operation depends on, or judge with another libllama.",
    ),
    "storage_rounding": Fault(
        "The right rotation, with more rounding than it bears",
        "The right fold explains the weights best; what is left was lost to the arithmetic of the "
        "fold, to the storage type or to the quantization.",
        REBAKE + " --baked-dtype float32",
    ),
}
"""Every code of a diagnosis."""

PROFILES: dict[str, Note] = {
    "default": Note(
        "The profile that judges unless another is named",
        "Absolute targets, widened by what is measured beside the candidate: for model directories "
        "the noise floor of their storage type, for quantized GGUF files the quantization floor of "
        "their types.",
        "It is chosen by qc --profile; limits of your own stand in a file: --profile FILE.yaml",
    ),
    "strict": Note(
        "The absolute targets, whatever the storage type",
        "No floor widens a target, and a check that could not be made fails the verdict. No "
        "16-bit checkpoint of a real model meets it: it is for float32 bakes.",
        "It is chosen by qc --profile; limits of your own stand in a file: --profile FILE.yaml",
    ),
}
"""Every profile of profiles.yaml."""

FILE_TYPE = "Limits of GGUF files of this type"
"""The title of every file type that a profile names."""

EXIT_CODES: dict[ExitCode, Note] = {
    ExitCode.OK: Note(
        "Done and passed",
        "The work is done, and no check that counts failed.",
        "Nothing is to be done. What a skipped check did not look at, it says itself.",
    ),
    ExitCode.VERDICT_FAILED: Note(
        "A verdict failed",
        "The work is done, and a check that counts failed.",
        "Read which, and what the diagnosis names: so8tqc report DIR shows both again.",
    ),
    ExitCode.USAGE: Note(
        "Usage or config",
        "A command, an option or a config value is wrong; nothing was computed.",
        "Mend what the message names. A run's file is looked over by so8tqc config check FILE",
    ),
    ExitCode.BAD_INPUT: Note(
        "Bad input",
        "A model, rotations or a text cannot be read, or one does not fit the other.",
        "The message names file and place; what is in a file is said by so8tqc doctor FILE",
    ),
    ExitCode.TOOL: Note(
        "A tool is missing or failed",
        "Something outside of so8tqc failed: libllama, the converter, Chrome, the disk, or another "
        "process that is writing to the same place.",
        "Do what the message says; what is missing, and how to get it, is said by so8tqc doctor",
    ),
    ExitCode.INTERNAL: Note(
        "A defect of so8tqc itself",
        "Something happened that was not planned; no verdict was given.",
        "Run the same command with --debug, and report its trace.",
    ),
    ExitCode.INTERRUPTED: Note(
        "Interrupted",
        "Ctrl-C ended the command; nothing half-done stays.",
        "Run the same command again: a run goes on where it stopped.",
    ),
    ExitCode.TERMINATED: Note(
        "Terminated",
        "SIGTERM ended the command (kill, a stopped container, a cancelled job); nothing half-done "
        "stays.",
        "Run the same command again: a run goes on where it stopped.",
    ),
}
"""Every exit code of every command."""
