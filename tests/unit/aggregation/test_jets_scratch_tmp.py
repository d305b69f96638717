from dataclasses import replace
import pytest, torch
from fedgraft.training.config import EngineConfig
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,o",[("fedjets",{"expert_noise":0.1}),("pm_moe",{"gate_dropout":0.0})])
def test_ds(name,o,make_job,run_job):
    got=[]
    for eng in (EngineConfig(name="torch",device="cpu"), EngineConfig(name="torch",device="cpu",gradient_accumulation_steps=2), EngineConfig.model_validate({"name":"deepspeed","device":"cpu","stage":2})):
        job=make_job({"name":name,"adapter":{"rank":2,"alpha":4.0}}|o, worker={"engine":eng})
        ran=run_job(replace(job,rounds=2))
        got.append([(r["total"]) for r in ran.rows("evaluations") if r["metric"]=="nll" and r["view"]=="personal"])
    for g in got: print(g)
    for g in got[1:]: assert g==pytest.approx(got[0],rel=2e-3)
