r"""Stage 2 of LLaVA v1.5: the mix of 665,298 conversations, 40,688 of them without a picture.

Fetch (the JSON, 1 GB, and about 60 GB of archives):

    hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json \
        --repo-type dataset --local-dir LLaVA-Instruct
    cd LLaVA-Instruct
    mkdir -p coco gqa ocr_vqa/images textvqa vg
    wget http://images.cocodataset.org/zips/train2017.zip                            # 18 GB
    wget https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip -O gqa.zip        # 21 GB
    wget https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip          # 7 GB
    wget https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip -O vg.zip        # 14 GB, with the next
    wget https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip -O vg2.zip
    unzip -q train2017.zip -d coco && unzip -q gqa.zip -d gqa && unzip -q train_val_images.zip -d textvqa
    unzip -q vg.zip -d vg && unzip -q vg2.zip -d vg
    cd ..

OCR-VQA comes one book cover at a time, every file saved as .jpg, by the script that LLaVA's README links to
(https://github.com/haotian-liu/LLaVA#visual-instruction-tuning). Many of its addresses have died; people
share copies of the pictures, such as https://huggingface.co/datasets/ej2/llava-ocr-vqa.

    vlmscale data prepare --records LLaVA-Instruct/llava_v1_5_mix665k.json --images LLaVA-Instruct \
        --out data/llava_instruct --validation 2000

Layout, and the records that name each folder:

    LLaVA-Instruct/coco/train2017           364,100
    LLaVA-Instruct/vg/VG_100K, VG_100K_2     86,417
    LLaVA-Instruct/ocr_vqa/images            80,000
    LLaVA-Instruct/gqa/images                72,140
    LLaVA-Instruct/textvqa/train_images      21,953
    no picture (ShareGPT)                    40,688

The prepared set takes about 90 GB, as a picture is stored with each record that shows it. That is an estimate
from mean file sizes; the command adds up your files before it writes.

To expect in quarantine.jsonl: `missing image` for what a download lacked (355 OCR-VQA records with LLaVA's
script in July 2024), `unreadable image` for damaged files (ocr_vqa/images/1437717772.jpg in the copy above).
GIFs named .jpg are no fault: pictures are read by their content. Look at every other class before you train.

As LLaVA trained it: template v1, pictures padded to a square with the mean colour, one epoch in batches of
128 conversations. `packing="modality_length"` gives LLaVA's own grouping; packed rows hold the same
conversations on fewer positions. Counts are those of LLaVA's tracker (issues 657 and 1618); the commands were
not run on the original.
"""

from vlmscale.config import DataConfig


def get_data(arg: str = "") -> DataConfig:
    """The stage's data; `arg` is the prepared directory (default data/llava_instruct)."""
    return DataConfig(
        source="llava",
        prepared=arg or "data/llava_instruct",
        tokenizer="vicuna-7b-v1.5",
        template="v1",
        tokenization="llava",
        image_mode="pad",
        max_text_tokens=2048,
        row_length=2048,
        packing="pack",
        pack_rows=4,
        features="computed",
        workers=8,
    )
