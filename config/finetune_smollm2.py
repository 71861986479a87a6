# Fine-tuning the released SmolLM2-135M on your own text; the default text is Shakespeare.
#   python train.py config/finetune_smollm2.py
#   python train.py config/finetune_smollm2.py --input=notes.txt --dataset=notes --out_dir=out/notes
# What comes out is a completer of documents like yours, not a chat partner: it continues text. To chat, start from an
# -Instruct model and expect it to unlearn some of that. The tokenizer must be the model's own, and is.
out_dir = "out/finetune_smollm2"
init_from = "HuggingFaceTB/SmolLM2-135M"
tokenizer = "HuggingFaceTB/SmolLM2-135M"
dataset = "shakespeare_smollm2"
input = "shakespeare"

block_size = 256
global_batch_size = 8
micro_batch_size = 4
max_iters = 200
learning_rate = 1e-4  # a thirtieth of pretraining's: the weights are good already
min_lr = 1e-5
warmup_iters = 20
weight_decay = 0.01

eval_interval = 50  # the first evaluation is before step 1, so that you see where you start from
eval_rows = 64
log_interval = 5
sample_interval = 100
patience = 3  # on a megabyte of text overfitting is a matter of a few epochs
