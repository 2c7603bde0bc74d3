//! Generates the messages of `proto/cri.proto`, without `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::Codegen;

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let proto = "proto/cri.proto";
    Codegen::new().out_dir(&out).inputs([proto]).include("proto").rust_protobuf().run()?;
    fs::write(out.join("mod.rs"), "pub mod cri;\n")?;
    println!("cargo:rerun-if-changed={proto}");
    Ok(())
}
