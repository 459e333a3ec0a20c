"""The tokenizer: one token a word, readable text back."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longthink.reasoner.vocabulary import BOS, EOS, PAD, TOKEN_IDS, UNK


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the reasoning task.

    Any white space separates tokens. Encoding adds ``<s>`` in front (not the end token), so a prompt can be handed to
    `generate` as it is. Decoding joins tokens by spaces and starts a new line at each fact, rule, query and line of
    the chain of thought.
    """
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_IDS[BOS])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            # "##" starts no token: all this does is to join tokens by spaces.
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[a-z]+=|\?|#)|(?<!;) (?=[a-z]+:)"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
