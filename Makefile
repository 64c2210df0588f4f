# `make demo`: pre-train on synthetic faces and look. `make test`: everything that must hold.

PYTHON ?= python3
RUN = .venv/bin/python
# Few enough faces, and steps enough, that a few minutes of two cores show something.
QUICK = --lr 1e-3 --clip_grad 1 --norm_pix_loss False --mask_ratio 0.5 --decoder_embed_dim 128 \
	--print_freq 1000 --save_ckpt_freq 100

.PHONY: demo test test-long lint clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(RUN) main_pretrain.py --model mae_vit_tiny_patch16 --input_size 48 --patch_size 8 \
		--decoder_depth 2 --decoder_num_heads 4 $(QUICK) --data_path synthetic:128 \
		--batch_size 16 --epochs 300 --warmup_epochs 10 --vis_freq 75 --output_dir demo/mae
	$(RUN) main_pretrain.py --model convnextv2_atto --input_size 128 $(QUICK) \
		--data_path synthetic:256 --batch_size 32 --epochs 48 --warmup_epochs 3 --vis_freq 12 \
		--output_dir demo/fcmae
	$(RUN) -m util.report demo/mae demo/fcmae --output demo/report.html

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not long"

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m long

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf demo output_dir .pytest_cache .ruff_cache
