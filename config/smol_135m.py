# Pretraining SmolLM2-135M: vocabulary 49,152, warmup-stable-decay, the published learning rate and betas.
#   python prepare.py --input="corpus/**/*.jsonl" --dataset=corpus --tokenizer=HuggingFaceTB/SmolLM2-135M
#   torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py
# The released model saw 2.1 trillion tokens: 2 million steps of 512 rows of 2,048. Source: huggingface/smollm,
# text/pretraining/smollm2/config_smollm2_135M.yaml. These are its settings for a run of 10 billion tokens.
out_dir = "out/smol_135m"
dataset = "corpus"
tokenizer = "HuggingFaceTB/SmolLM2-135M"

block_size = 2048
global_batch_size = 512  # 1.05 million tokens a step, as published
micro_batch_size = 16  # about 30 GB; halve it until it fits
max_position_embeddings = 2048
rope_theta = 10000.0  # as in pretraining; the released 100,000 came with the extension to 8,192 positions

_tokens = 10e9
max_iters = int(_tokens / (global_batch_size * block_size))  # 9,536
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_fraction = 0.2  # as published; the stable phase can be extended later, which is the point of this schedule
warmup_iters = 500  # published: 2,000 of 2 million; a shorter run needs a larger share
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 500
eval_rows = 1000
log_interval = 10
sample_interval = 1000
