r"""Stage 1 of LLaVA v1.5: 558,128 captioned pictures (LAION, CC and SBU, captions by BLIP).

Fetch (27.4 GB, then the same again unpacked) and prepare (about 27 GB more):

    hf download liuhaotian/LLaVA-Pretrain blip_laion_cc_sbu_558k.json images.zip \
        --repo-type dataset --local-dir LLaVA-Pretrain
    unzip -q LLaVA-Pretrain/images.zip -d LLaVA-Pretrain/images
    vlmscale data prepare --records LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
        --images LLaVA-Pretrain/images --out data/llava_pretrain --validation 2000

which leaves

    LLaVA-Pretrain/blip_laion_cc_sbu_558k.json     181 MB; "image": "00453/004539375.jpg"
    LLaVA-Pretrain/images/00000 ... 00659/*.jpg
    data/llava_pretrain                            the prepared data set

Expected: 558,128 records read, one picture and one turn each, none quarantined if images.zip arrived whole.
A copy whose pictures were fetched one by one from their addresses misses many (`missing image`).

As LLaVA trained it: template plain (the question is dropped, the caption and its line end are learnt),
pictures cropped, one epoch in batches of 256 captions. Here rows are packed, many captions to a row;
`packing="none"` gives LLaVA's batches. Figures are those of the Hub's listing and LLaVA's README; the
commands were not run on the original.
"""

from vlmscale.config import DataConfig


def get_data(arg: str = "") -> DataConfig:
    """The stage's data; `arg` is the prepared directory (default data/llava_pretrain)."""
    return DataConfig(
        source="llava",
        prepared=arg or "data/llava_pretrain",
        tokenizer="vicuna-7b-v1.5",
        template="plain",
        tokenization="llava",
        image_mode="crop",
        max_text_tokens=2048,
        row_length=2048,
        packing="pack",
        pack_rows=4,
        features="computed",
        workers=8,
    )
