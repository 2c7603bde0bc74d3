//! Generates the agent's service and messages from `proto/agent.proto`, without `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    fs::write(out.join("mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")?;
    println!("cargo:rerun-if-changed=proto/agent.proto");
    Ok(())
}
