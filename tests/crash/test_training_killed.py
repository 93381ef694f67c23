"""try"""
from pathlib import Path
pytest_plugins = ["training"]
def test_a(train_in_child, whole, fast_dir):
    e = train_in_child(fast_dir/"a")
    assert e.result == whole, e
    log = fast_dir/"log"
    e = train_in_child(fast_dir/"b", fault={"step": 4, "until": 5, "mode": 0, "log": str(log)}, save_total_limit=2)
    assert e.result == whole, e
    print(log.read_text()[:30000])
    e = train_in_child(fast_dir/"c", signals=[{"at":"on_step_begin","nth":3,"signal":15}])
    print(e)
    e = train_in_child(fast_dir/"c", resume=True)
    assert e.result==whole
