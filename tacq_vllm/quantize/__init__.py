"""Making a checkpoint: calibration, saliency, selection, GPTQ, export."""
