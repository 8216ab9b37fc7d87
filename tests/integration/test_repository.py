from sqlalchemy import Engine
from sqlalchemy.orm import Session
from sqlalchemy_lucent import *
def test_x(engine):
    LucentBase.metadata.create_all(engine)
    with Session(engine) as s:
        LucentSecrets(s).set("a:b:c:d", {"x":1}); s.commit()
        assert LucentSecrets(s).require("a:b:c:d") == {"x":1}
def test_y(run_async):
    async def work(engine):
        async with engine.begin() as c: await c.run_sync(LucentBase.metadata.create_all)
    run_async(work)
