# `make demo`: the whole story on drawn faces, in minutes. `make test`: everything that must hold.

PYTHON ?= python3
RUN = .venv/bin/python
# Small enough for a few minutes of two cores, large enough to show something.
MODEL = --model convnextv2_atto --input_size 64 --clip_grad 1 --print_freq 1000 --save_ckpt_freq 100
PRETRAIN = --data_path synthetic-lab:4000 --mask_ratio 0.5 --norm_pix_loss False \
	--decoder_embed_dim 128 --lr 2e-3 --batch_size 32 --epochs 8 --warmup_epochs 1 --vis_freq 2
FEW_LABELS = --data_path synthetic-lab:400:400 --aug randaug --aa '' --crop_scale 0.7 --crop_pct 1 \
	--reprob 0 --lr 6e-4 --batch_size 16 --epochs 16 --warmup_epochs 2 --num_workers 0
# A run a core is faster than a run on both.
THREE_SEEDS = OMP_NUM_THREADS=1 $(RUN) benchmarks/reproduce.py $(MODEL) $(FEW_LABELS) --seeds 0 1 2

.PHONY: demo demo/pre-trained demo/from-scratch test test-long lint clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(RUN) main_pretrain.py $(MODEL) $(PRETRAIN) --output_dir demo/pre-training
	$(MAKE) -j2 demo/pre-trained demo/from-scratch
	$(RUN) -m util.report demo/pre-training demo/pre-trained/seed-* demo/from-scratch/seed-* \
		--output demo/report.html

demo/pre-trained: .venv/run
	$(THREE_SEEDS) --finetune demo/pre-training/checkpoint-last.pth --output_dir $@

demo/from-scratch: .venv/run
	$(THREE_SEEDS) --head_init_scale 1 --output_dir $@

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not long"

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m long

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf demo output_dir .pytest_cache .ruff_cache
