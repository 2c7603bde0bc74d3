//! The sandbox service's nine methods: decode, carry out, encode.

use std::env::consts::ARCH;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    ttrpc::{Result as Answer, asynchronous::TtrpcContext},
};
use protobuf::well_known_types::any::Any;

use super::{
    Service,
    error::ServiceError,
    events::{bytes, timestamp},
    metrics,
    task_api::carry_out,
};

#[async_trait]
impl Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Answer<CreateSandboxResponse> {
        self.declare(&request)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Answer<StartSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let service = self.clone();
        let start = async move { Self::start_sandbox(&service).await };
        let condition = carry_out("start the sandbox", start).await?;
        let mut answer = StartSandboxResponse::new();
        answer.set_pid(condition.pid);
        answer.set_created_at(timestamp(condition.up_at.unwrap_or_else(SystemTime::now)));
        Ok(answer)
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> Answer<PlatformResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let mut answer = PlatformResponse::new();
        let platform = answer.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // By Go's names.
        platform.architecture = match ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(answer)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Answer<StopSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let service = self.clone();
        let seconds = Some(request.timeout_secs).filter(|seconds| *seconds > 0);
        let limit = seconds.map(|seconds| Duration::from_secs(seconds.into()));
        let stop = async move { Self::stop_sandbox(&service, limit).await };
        carry_out("stop the sandbox", stop).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Answer<WaitSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let end = Self::wait_sandbox(self).await?;
        let mut answer = WaitSandboxResponse::new();
        answer.set_exit_status(end.code);
        answer.set_exited_at(timestamp(end.at));
        Ok(answer)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Answer<SandboxStatusResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let condition = self.condition();
        let mut answer = SandboxStatusResponse::new();
        answer.set_sandbox_id(request.sandbox_id);
        answer.set_pid(condition.pid);
        let state = if condition.is_ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" };
        answer.set_state(state.to_owned());
        if let Some(at) = condition.up_at {
            answer.set_created_at(timestamp(at));
        }
        if let Some(end) = condition.end {
            answer.set_exited_at(timestamp(end.at));
        }
        if request.verbose {
            answer.info.insert("sandbox".to_owned(), condition.words);
            answer.info.insert("containers".to_owned(), condition.containers.to_string());
        }
        Ok(answer)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Answer<PingResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Answer<ShutdownSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let service = self.clone();
        let end = async move { service.shut_sandbox_down().await };
        carry_out("shut the sandbox down", end).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        if !self.condition().is_ready {
            return Err(ServiceError::NoSandbox(request.sandbox_id).into());
        }
        let stats = self.sandbox_stats().await;
        let mut answer = SandboxMetricsResponse::new();
        let metric = answer.metrics.mut_or_insert_default();
        metric.set_timestamp(timestamp(SystemTime::now()));
        metric.set_id(request.sandbox_id);
        let type_url = metrics::TYPE.to_owned();
        metric.set_data(Any { type_url, value: bytes(&stats), ..Any::new() });
        Ok(answer)
    }
}
