from omegaconf import OmegaConf
def run(cfg):
    print(OmegaConf.to_yaml(cfg))
