//! Compiles `lockstep.proto` without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=lockstep.proto");
    let descriptors = protox::compile(["lockstep.proto"], ["."])?;
    tonic_prost_build::configure()
        .bytes(".lockstep.v1.Chunk.data")
        .bytes(".lockstep.v1.Column.data")
        .compile_fds(descriptors)?;
    Ok(())
}
