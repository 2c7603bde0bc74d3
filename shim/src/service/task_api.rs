//! The task service's seventeen methods: decode, carry out, encode. Both versions of the protocol end
//! here, as their messages are the same.

use std::future::Future;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::Task,
    ttrpc::{Result as Answer, asynchronous::TtrpcContext},
};
use protobuf::well_known_types::any::Any;

use super::{
    Service,
    error::ServiceError,
    events::{bytes, timestamp},
    metrics,
};
use crate::{agent::ProcessId, error_chain};

/// Carries a request out in a task of its own, which a broken connection does not end.
pub(super) async fn carry_out<T: Send + 'static>(
    what: &'static str,
    request: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(request).await.map_err(ServiceError::from).and_then(|done| done);
    done.map_err(|error| {
        log::info!("{what}: {}", error_chain(&error));
        error.into()
    })
}

fn process(container: String, exec: String) -> ProcessId {
    ProcessId { container, exec }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        Ok(Self::state(self, request)?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Answer<CreateTaskResponse> {
        let service = self.clone();
        let pid = carry_out("create", async move { service.create(request).await }).await?;
        let mut answer = CreateTaskResponse::new();
        answer.set_pid(pid);
        Ok(answer)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let service = self.clone();
        let process = process(request.id, request.exec_id);
        let pid = carry_out("start", async move { service.start(process).await }).await?;
        let mut answer = StartResponse::new();
        answer.set_pid(pid);
        Ok(answer)
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let service = self.clone();
        let process = process(request.id, request.exec_id);
        let deleted = carry_out("delete", async move { service.delete(process).await }).await?;
        let mut answer = DeleteResponse::new();
        answer.set_pid(deleted.pid);
        answer.set_exit_status(deleted.end.code);
        answer.set_exited_at(timestamp(deleted.end.at));
        Ok(answer)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        Ok(Self::pids(self, &request.id)?)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let service = self.clone();
        carry_out("pause", async move { service.pause(request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let service = self.clone();
        carry_out("resume", async move { service.resume(request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(ServiceError::Unsupported("checkpointing").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let service = self.clone();
        carry_out("kill", async move { service.kill(request).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        Self::exec(self, request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let service = self.clone();
        carry_out("resize", async move { service.resize(request).await }).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        if request.stdin {
            self.close_input(&process(request.id, request.exec_id))?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let service = self.clone();
        carry_out("update", async move { service.update(request).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let end = Self::wait(self, &process(request.id, request.exec_id)).await?;
        let mut answer = WaitResponse::new();
        answer.set_exit_status(end.code);
        answer.set_exited_at(timestamp(end.at));
        Ok(answer)
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let stats = Self::stats(self, &request.id).await?;
        let mut answer = StatsResponse::new();
        let type_url = metrics::TYPE.to_owned();
        answer.set_stats(Any { type_url, value: bytes(&stats), ..Any::new() });
        Ok(answer)
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        Ok(Self::connect(self, &request.id))
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        self.shut_down(request.now);
        Ok(Empty::new())
    }
}
