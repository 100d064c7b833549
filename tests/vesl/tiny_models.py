"""Tiny random models of transformers' real classes, and NLTK data of a small text, in folders as users have them."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import torch

WORDS = "a the red blue dog cat ball tree old on of photo sees big small and"
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]

# The tagger learns from these what a caption of the tests needs: word/tag, tags of the Penn treebank.
TAGGED = """
a/DT red/JJ dog/NN sees/VBZ the/DT old/JJ tree/NN ./.
the/DT big/JJ cat/NN sees/VBZ a/DT blue/JJ ball/NN ./.
a/DT dog/NN and/CC a/DT cat/NN sit/VBP on/IN the/DT red/JJ sofa/NN ./.
the/DT old/JJ man/NN holds/VBZ two/CD apples/NNS in/IN his/PRP$ hand/NN ./.
green/JJ apples/NNS and/CC blue/JJ balls/NNS on/IN a/DT table/NN ,/, a/DT dog/NN under/IN it/PRP ./.
he/PRP sees/VBZ it/PRP ./. she/PRP holds/VBZ a/DT very/RB small/JJ ball/NN ./.
a/DT photo/NN :/: the/DT blue/JJ ball/NN and/CC grass/NN ,/, old/JJ cat/NN ./.
this/DT is/VBZ the/DT same/NN of/IN a/DT red/JJ house/NN ./.
"""
PLAIN = "A dog sees Mr. Brown. The cat sees Mr. Smith. Mr. Brown sees a tree. It is old. It is big. He sees it."


def nltk_data(root: Path) -> Path:
    """A folder for NLTK_DATA: NLTK's own sentence splitter and tagger, trained on the texts above."""
    import nltk
    from nltk.tag.perceptron import PerceptronTagger
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    nltk.data.path.insert(0, str(root))  # NLTK writes below its own folders alone
    try:
        sentences = [[tuple(pair.rsplit("/", 1)) for pair in line.split()] for line in TAGGED.strip().splitlines()]
        tagger = PerceptronTagger(load=False)
        state = random.getstate()
        random.seed(0)  # it shuffles
        tagger.train(25 * sentences)  # words seen 20 times are looked up, so that a test depends on no weights
        random.setstate(state)
        folder = root / "taggers" / "averaged_perceptron_tagger_eng"
        folder.mkdir(parents=True)
        for part, value in (
            ("weights", tagger.model.weights),
            ("tagdict", tagger.tagdict),
            ("classes", sorted(tagger.classes)),
        ):
            (folder / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(value))
        trainer = PunktTrainer()
        trainer.train(PLAIN * 3, finalize=True)
        tokens = root / "tokenizers" / "punkt_tab" / "english"
        tokens.mkdir(parents=True, mode=0o700)
        save_punkt_params(trainer.get_params(), str(tokens))
    finally:
        nltk.data.path.remove(str(root))
    return root


def owlv2(folder: Path, seed: int = 0, native: int = 48, model_type: str = "owlv2") -> Path:
    """A detector with patches of 16 pixels, made for `native` pixels; what it finds depends on image and phrase."""
    import transformers as hf

    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=16)
    config, model, image = {
        "owlv2": (hf.Owlv2Config, hf.Owlv2ForObjectDetection, hf.Owlv2ImageProcessor),
        "owlvit": (hf.OwlViTConfig, hf.OwlViTForObjectDetection, hf.OwlViTImageProcessor),
    }[model_type]
    torch.manual_seed(seed)
    made = model(
        config(
            text_config={**text, "max_position_embeddings": 16},
            vision_config={**vision, "image_size": native},
            projection_dim=16,
        )
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() > 1:  # transformers' own start is so small that all phrases score alike
                weight.normal_(0, 0.3 if "head" in name else 0.15)
        made.class_head.logit_scale.bias.fill_(3.0)
    made.save_pretrained(folder)
    processor = hf.Owlv2Processor if model_type == "owlv2" else hf.OwlViTProcessor
    size = {"height": native, "width": native}
    processor(image(size=size, image_mean=MEAN, image_std=STD), clip_tokenizer(folder)).save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path):
    import transformers as hf

    letters = [*string.ascii_lowercase]
    # "!" is what CLIP's tokenizers of OWL pad with, and its number is 0
    entries = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return hf.CLIPTokenizer.from_pretrained(folder, pad_token="!", model_max_length=16)


def bert_tokenizer(folder: Path):
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]) + "\n")
    return hf.BertTokenizer.from_pretrained(folder)


def blip(folder: Path, seed: int = 0) -> Path:
    import transformers as hf

    tokenizer = bert_tokenizer(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    torch.manual_seed(seed)
    config = hf.BlipConfig(
        text_config={**sizes, **special, "vocab_size": len(tokenizer), "encoder_hidden_size": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    model = hf.BlipForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    image = hf.BlipImageProcessor(size={"height": 32, "width": 32})
    hf.BlipProcessor(image, tokenizer).save_pretrained(folder)
    return folder


def git(folder: Path, seed: int = 0) -> Path:
    import transformers as hf

    tokenizer = bert_tokenizer(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(seed)
    config = hf.GitConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = hf.GitForCausalLM(config)
    _spread(model)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    image = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    hf.GitProcessor(image, tokenizer).save_pretrained(folder)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that different images get different captions."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5)
