//! `nacre stop` and `nacre rm`.

use std::time::Duration;

use shim::{
    paths,
    registry::Registry,
    sandbox::{self, StopError},
};

use crate::{
    args::{Rm, Stop},
    failure::Failure,
    runtime,
};

pub(crate) fn stop(args: &Stop) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    runtime()?.block_on(async {
        for name in &args.names {
            sandbox::stop(&registry, name, Duration::from_secs(args.time)).await?;
        }
        Ok::<(), StopError>(())
    })?;
    Ok(0)
}

pub(crate) fn remove(args: &Rm) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    runtime()?.block_on(async {
        for name in &args.names {
            sandbox::remove(&registry, name, args.force).await?;
        }
        Ok::<(), StopError>(())
    })?;
    Ok(0)
}
