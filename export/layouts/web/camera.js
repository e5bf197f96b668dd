// The camera's frames, the newest one when it is asked for. They stay in the page.

const REASONS = {
  NotAllowedError: "The camera was refused. Allow it for this page in the browser, or choose an image.",
  NotFoundError: "No camera was found. Connect one, or choose an image.",
};

export class Camera {
  constructor(video) {
    this.video = video;
    this.stream = null;
    this.fresh = null; // a promise of a frame that was not seen yet
  }

  get isOn() {
    return this.stream !== null;
  }

  /** Ask for the camera. Rejects with a reason and what to do. */
  async start() {
    if (!navigator.mediaDevices) {
      throw new Error("Browsers give the camera to pages from this machine or over https only. Choose an image instead.");
    }
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480, facingMode: "environment" } });
      this.video.srcObject = this.stream;
      await this.video.play();
    } catch (error) {
      this.stop();
      throw new Error(REASONS[error.name] ?? `The camera cannot be used: ${error.message}. Choose an image instead.`);
    }
    this.stream.getVideoTracks()[0].onended = () => this.stop();
    this.expect();
  }

  stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.srcObject = null;
    this.ended?.();
  }

  expect() {
    this.fresh = new Promise((resolve) => {
      this.ended = resolve;
      if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(() => resolve());
      else requestAnimationFrame(() => resolve());
    });
  }

  /** Return the newest frame, as soon as there is one that was not returned before; null when the camera has been stopped. */
  async frame() {
    await this.fresh;
    if (!this.isOn) return null;
    this.expect();
    return createImageBitmap(this.video);
  }
}
